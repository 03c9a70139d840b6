"""The page over HTTP: who is answered, what its buttons do, what it shows, its words. No browser and no training is needed."""

import json
import re
import socket

import pytest
from conftest import REPOSITORY, picture
from PIL import Image

import dreambooth_implementation as db
from webui.jobs import ENDED, Job
from webui.library import title_of
from webui.main import main
from webui.pictures import parse_parameters
from webui.program import FIELDS, environment, recipe

pytest_plugins = ["webui_pages"]  # library, page, trained, photo_bytes
STATIC = REPOSITORY / "webui" / "static"


# ---- who is answered


def test_the_page_answers_this_machine_alone(page):
    status, headers, body = page.request("GET", "/")
    assert status == 200 and b"<!doctype html>" in body
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    assert page.request("GET", "/", Host=f"localhost:{page.port}")[0] == 200
    own = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in own | {"127.0.0.2"}:  # on Linux this one is always there
        with pytest.raises(OSError):
            socket.create_connection((address, page.port), timeout=2)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example",
                                  "0.0.0.0", "192.168.0.2:7860", "127.0.0.1:x", "user@127.0.0.1", "", None])
def test_other_hosts_are_refused(host, page):
    for method, path, body in (("GET", "/", None), ("GET", "/api/state", None), ("POST", "/api/clear_draft", b"{}")):
        status, _, answer = page.request(method, path, body, Host=host)
        assert status == 403 and json.loads(answer)["refused"] == "other_host"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1", "http://localhost",
                                    None])
def test_what_another_site_asks_changes_nothing(origin, page, library, photo_bytes):
    assert page.request("POST", "/api/clear_draft", b"{}", Origin=origin)[0] == 403
    assert page.request("PUT", "/api/photo?name=a.png", photo_bytes(), Origin=origin)[0] == 403
    assert not library.draft.exists()


def test_what_another_site_embeds_is_refused(page):
    for site in ("cross-site", "same-site"):
        status, headers, _ = page.request("GET", "/static/icon.svg", Sec_Fetch_Site=site)
        assert status == 403 and headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert page.request("GET", "/static/icon.svg", Sec_Fetch_Site="same-origin")[0] == 200
    assert page.request("GET", "/", Sec_Fetch_Site="cross-site")[0] == 200  # a link may lead here


@pytest.mark.parametrize("path", [
    "/files/../secret.png", "/files/%2e%2e/secret.png", "/files/trained/dog/../../../secret.png", "/files//etc/passwd",
    "/files/trained/dog/title.txt", "/files/trained/dog/output/dreambooth.json", "/files/trained/dog/.hidden.png",
    "/files/trained/dog/..%5c..%5csecret.png", "/files/link/secret.png", "/outside/../secret.png", "/outside/photos/secret.png",
    "/outside/output/../secret.png", "/static/../main.py", "/static/%2e%2e/main.py", "/files/", "/files/trained/dog/a%00.png",
    "/files/trained/dog/photos/model.safetensors", "/nowhere", "/api/nothing", "/api/__class__"])
def test_no_other_file_is_given_out(path, page, trained, library, tmp_path):
    place = trained("dog")
    (tmp_path / "photos").mkdir()
    for file in (tmp_path / "secret.png", tmp_path / "photos" / "secret.png", place / ".hidden.png"):
        picture(0).save(file)
    (place / "photos" / "model.safetensors").write_bytes(b"weights")
    (library.root / "link").symlink_to(tmp_path, target_is_directory=True)
    assert page.request("GET", path)[0] == 404


def test_what_is_not_the_pages_own_is_refused_in_its_words(page):
    for body in (b"", b"[]", b"{", b"\xff", b'{"fields": 3}', b'{"fields": {"steps": {}}}'):
        status, _, answer = page.request("POST", "/api/train", body)
        assert status == 400 and json.loads(answer)["refused"] in ("cut_short", "no_photos_yet"), answer
    assert page.request("POST", "/api/train", b"{}", Content_Length="99999999")[0] == 413
    assert page.request("POST", "/api/train", b"{}", Content_Length="-1")[0] == 411
    assert page.act("os.system") == (404, "gone", {})


# ---- photos


def test_photos_are_shown_as_the_program_sees_them(page, photo_bytes, library):
    assert page.put("photo", "a.png", photo_bytes(0)) == {} and page.put("photo", "b.png", photo_bytes(0)) == {}
    page.put("photo", "strip.png", photo_bytes(1, (400, 40)))
    page.act("caption", name="b.png", text="a sks dog  in the snow")
    seen = page.get("/api/draft")["seen"]
    assert [(photo["name"], photo["caption"], photo["size"]) for photo in seen["photos"]] == [
        ("a.png", None, [48, 40]), ("b.png", "a sks dog in the snow", [48, 40]), ("strip.png", None, [400, 40])]
    assert [line.split(";")[0] for line in seen["remarks"]] == [
        "Note: b.png is the same picture as a.png", "Note: strip.png is 400 x 40", "Shapes: 2 of 72 x 56, 1 of 96 x 40 pixels"]
    status, headers, body = page.request("GET", seen["photos"][2]["url"])
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    (library.root / "shown.jpg").write_bytes(body)
    image = db.load_image(library.root / "shown.jpg")
    assert image.size == (320, 32)
    original = db.load_image(library.draft / "photos" / "strip.png").resize(image.size)
    faded, clear = (abs(image.getpixel(at)[0] - original.getpixel(at)[0]) for at in ((10, 16), (160, 16)))
    assert clear < 20 and min(image.getpixel((10, 16))) > 150 and faded > clear

    page.act("remove_photo", name="b.png")
    assert [path.name for path in sorted((library.draft / "photos").iterdir())] == ["a.png", "strip.png"]  # its caption went, too
    page.act("clear_draft")
    assert page.get("/api/draft")["seen"]["photos"] == []


def test_a_photo_is_cut_as_the_model_will_have_it_and_tinted_by_its_mask(page, library, tmp_path):
    def seen(**fields):
        page.act("keep_fields", **fields)
        answer = page.get("/api/draft")["seen"]
        (tmp_path / "shown.jpg").write_bytes(page.request("GET", answer["photos"][0]["url"])[2])
        return answer, db.load_image(tmp_path / "shown.jpg")

    image = Image.new("RGB", (320, 192), (0, 200, 0))
    image.paste((0, 0, 200), (200, 30, 320, 160))  # the subject stands to the right
    image.save(tmp_path / "wide.png")
    page.put("photo", "wide.png", (tmp_path / "wide.png").read_bytes())
    _, demo = seen(model_name="demo")
    assert [demo.getpixel((x, 80))[0] < 60 for x in (20, 110, 145, 310)] == [False, False, True, True]  # the square to the right
    answer, whole = seen(model_name="sd15")
    assert "Shapes: 1 of 640 x 384 pixels; class images likewise." in answer["remarks"]
    assert whole.getpixel((3, 80))[0] < 60 and not answer["photos"][0]["has_mask"]  # all of it

    mask = Image.new("L", image.size)
    mask.paste(255, (200, 30, 320, 160))
    mask.save(tmp_path / "mask.png")
    page.put("photo", "wide.mask.png", (tmp_path / "mask.png").read_bytes())
    answer, tinted = seen()
    assert [photo["name"] for photo in answer["photos"]] == ["wide.png"] and answer["photos"][0]["has_mask"]
    assert tinted.getpixel((20, 80))[0] > 100 and tinted.getpixel((260, 80))[0] < 60
    page.act("remove_photo", name="wide.png")
    assert list((library.draft / "photos").iterdir()) == []  # the mask went with it


def test_what_cannot_be_read_is_told_in_the_programs_words(page):
    page.put("photo", "broken.png", b"no picture")
    assert page.get("/api/draft")["seen"]["error"].startswith("broken.png")
    assert page.act("train", fields={"class_prompt": "a dog"})[1] == "program"


@pytest.mark.parametrize("name", ["", ".hidden.png", "..", "a\nb.png", "a:b.png", "x" * 300])
def test_names_that_no_file_can_have(name, page, library):
    assert page.put("photo", name, b"x") == (400, "bad_name")
    assert not (library.draft / "photos").exists()


def test_a_path_is_left_with_its_last_part(page, photo_bytes, library):
    for name in ("../../up.png", "C:\\photos\\down.png"):
        assert page.put("photo", name, photo_bytes()) == {}
    page.put("photo", "up.png", photo_bytes(1))
    assert {path.name for path in (library.draft / "photos").iterdir()} == {"up.png", "down.png", "up-2.png"}


# ---- trainings


def test_a_training_is_a_command_of_the_program(page, photo_bytes, library):
    page.put("photo", "a.png", photo_bytes())
    assert page.act("train", fields={})[1] == "no_class_prompt"
    assert page.act("train", fields={"class_prompt": "a dog", "steps": "many"})[:2] == (400, "program")
    assert not library.trained.exists()
    fields = {"class_prompt": "--help", "steps": "20", "method": "lora", "train_text_encoder": True, "random_flip": False,
              "output_dir": "/", "learning_rate": ""}
    assert page.act("train", fields=fields, title="Rex") == {"item": "rex"}
    assert Job(library.trained / "rex" / "job").command["flags"] == [
        "--train", "--instance_data_dir=library/trained/rex/photos", "--output_dir=library/trained/rex/output",
        "--class_data_dir=library/class_images", "--class_prompt=--help", "--steps=20", "--method=lora", "--train_text_encoder"]
    assert (library.trained / "rex" / "photos" / "a.png").is_file()

    assert page.act("train", fields={"class_prompt": "a dog"}, title="Rex") == {"item": "rex-2"}  # no output is replaced
    assert page.get("/api/draft")["used"]
    page.put("photo", "new.png", photo_bytes(1))  # instead of those that were trained
    assert [photo["name"] for photo in page.get("/api/draft")["seen"]["photos"]] == ["new.png"]
    states = {job["title"]: job["state"] for job in page.get("/api/state")["jobs"]}
    assert states == {"Rex": "waiting"} and len(page.get("/api/state")["jobs"]) == 2


def test_fields_are_there_after_a_reload(page, photo_bytes):
    page.act("keep_fields", class_prompt="a cat", steps="30", random_flip=True, nonsense="x", rank={"a": 1})
    assert page.get("/api/draft")["fields"] == {"class_prompt": "a cat", "steps": "30", "random_flip": True}
    page.act("keep_fields", class_prompt="a dog", title="Rex")
    page.put("photo", "a.png", photo_bytes())
    page.act("train", fields={"class_prompt": "a dog"}, title="Rex")
    assert page.get("/api/draft")["fields"] == {"class_prompt": "a dog"}  # the next has another name


def test_a_recipes_own_values_are_shown(page):
    fields = page.get("/api/defaults", method="lora", model_name="sdxl")
    shown = fields["recipe"]
    assert (shown["steps"], shown["learning_rate"], shown["resolution"], shown["rank"]) == (800, "0.0001", 1024, 16)
    assert [field["name"] for field in fields["fields"]] == list(FIELDS)
    assert recipe({}, has_gpu=False)["resolution"] == 64 and recipe({}, has_gpu=True)["resolution"] == 512
    assert recipe({"model_name": str(db.BUNDLED_MODEL), "select_best": "1"}, False)["steps"] == 1600
    assert "steps" not in recipe({"model_name": "nobody/knows"}, False)
    assert recipe({"method": "textual_inversion"}, False)["num_class_images"] is None
    assert recipe({"train_text_encoder": "1"}, False)["text_encoder_lr"] == "5e-05"


def test_training_longer_begins_where_the_other_ended(page, trained, library):
    place = trained("dog", method="full")
    step = place / "output" / "checkpoints" / "step-000500"
    step.mkdir(parents=True)
    page.act("train_again", item="dog", longer=True)
    draft = page.get("/api/draft")
    assert draft["goes_on"] == {"item": "dog", "title": "dog", "how": "checkpoint", "step": 500}
    assert draft["fields"]["steps"] == "1600"
    new = page.act("train", fields={"class_prompt": "a dog", "steps": "1600"}, title="dog +")["item"]
    assert f"--resume={step}" in Job(library.trained / new / "job").command["flags"]
    assert page.get("/api/draft")["goes_on"] is None  # the one after that begins anew

    step.rmdir()
    page.act("train_again", item="dog", longer=True)
    assert page.get("/api/draft")["goes_on"]["how"] == "model"
    new = page.act("train", fields={"class_prompt": "a dog"}, title="dog")["item"]
    flags = Job(library.trained / new / "job").command["flags"]
    assert {"--model_name=library/trained/dog/output", "--identifier=sks"} <= set(flags)


@pytest.mark.long
def test_the_program_goes_on_where_the_page_says(page, photo_bytes, library, run, tiny_model):
    """Two trainings as the page gives them; the second begins with the first one's checkpoint."""
    for number in range(2):
        page.put("photo", f"{number}.png", photo_bytes(number))
    fields = {"class_prompt": "a dog", "method": "lora", "model_name": str(tiny_model("sd1")), "steps": "3",
              "num_class_images": "2", "rank": "2"}

    def train(fields, title):
        job = library.item(page.act("train", fields=fields, title=title)["item"]).job
        status, out, err = run(*job.command["flags"], "--checkpointing_steps", 2, "--num_inference_steps", 1)
        assert status == 0, err
        job.write("exit", status)
        return out

    train(fields, "Rex")
    page.act("train_again", item="rex", longer=True)
    draft = page.get("/api/draft")
    assert (draft["goes_on"]["step"], draft["fields"]["steps"], draft["fields"]["title"]) == (2, "6", "Rex +")
    assert "Going on after step 2 of 6" in train({name: draft["fields"][name] for name in fields}, "Rex +")
    cards = {card["title"]: card for card in page.get("/api/state")["items"]}
    assert (cards["Rex"]["steps"], cards["Rex +"]["steps"]) == (3, 6) and page.request("GET", cards["Rex +"]["picture"])[0] == 200


# ---- the library


def test_a_card_tells_what_was_trained(page, trained, library, tmp_path):
    trained("dog")
    evaluation = library.compared / "dog" / "evaluation"
    evaluation.mkdir(parents=True)
    (evaluation / "evaluation.json").write_text(json.dumps({"models": [
        {"model_path": "library/trained/dog/output", "scores": {"dino": 0.5}, "subjects": [{"real": {"dino": 0.9}}]}]}))
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "dreambooth.json").write_bytes((library.trained / "dog" / "output" / "dreambooth.json").read_bytes())
    cards = {card["id"]: card for card in page.get("/api/state")["items"]}
    dog = cards["dog"]
    assert (dog["words"], dog["prompt"], dog["method"], dog["steps"], dog["model"]) == (["sks"], "a [identifier] dog", "lora", 800,
                                                                                      "demo/model")
    assert dog["scores"] == {"dino": 0.5} and page.request("GET", dog["picture"])[0] == 200
    assert cards["./output"]["own"] is False and cards["./output"]["trained"]  # one that was trained without the page
    assert page.act("delete_item", item="./output")[1] == page.act("retitle", item="./output", title="x")[1] == "not_ours"
    assert page.get("/api/state")["compared"][0]["rows"][0]["name"] == "dog"


def test_a_damaged_record_is_no_training(page, trained):
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"subjects": [], "method": "full"}'),
                       ("d", '{"subjects": [{"identifier": "x"}], "method": "magic"}')):
        (trained(name) / "output" / "dreambooth.json").write_text(text)
    assert [card["trained"] for card in page.get("/api/state")["items"]] == [False] * 4


def test_renaming(page, trained, library):
    trained("dog")
    assert page.act("retitle", item="dog", title="  My\tRex ") == {} and title_of(library.item("dog")) == "My Rex"
    for title in ("", " ", "x" * 81, "a\x00b"):
        assert page.act("retitle", item="dog", title=title)[1] == "bad_title"
    assert title_of(library.item("dog")) == "My Rex"


def test_deleting_asks_first(page, trained, library):
    place = trained("dog")
    page.act("retitle", item="dog", title="Rex")
    assert page.act("delete_item", item="dog") == (409, "really_delete", {"id": "dog", "name": "Rex"})
    assert page.act("delete_item", item="dog", confirmed="cat")[1] == "really_delete" and place.exists()
    assert page.act("delete_item", item="dog", confirmed="dog") == {} and list(library.trained.iterdir()) == []
    assert page.act("delete_item", item="../..", confirmed="../..") == (404, "gone", {})

    library.pictures.mkdir()
    picture(0).save(library.pictures / "a-0.png")
    assert page.act("delete_picture", name="a-0.png")[1] == "really_delete"
    assert page.act("delete_picture", name="../pictures/a-0.png", confirmed="../pictures/a-0.png")[1] == "gone"
    assert page.act("delete_picture", name="a-0.png", confirmed="a-0.png") == {} and not list(library.pictures.iterdir())


def test_what_a_job_needs_is_not_deleted(page, trained):
    trained("dog")
    page.act("draw", item="dog", prompt="a [identifier] dog")
    assert page.act("delete_item", item="dog", confirmed="dog")[:2] == (409, "in_use")


# ---- drawing, comparing, exporting


def test_a_drawing_is_a_command_of_the_program(page, trained, library):
    trained("dog"), trained("cat")
    assert page.put("adapter", "style.safetensors", b"weights") == {"name": "style.safetensors"}
    assert page.put("adapter", "style.safetensors", b"weights") == (400, "name_taken")
    assert page.put("adapter", "style.ckpt", b"weights") == (400, "not_safetensors")
    adapters = [{"source": "style.safetensors", "strength": "0.5"}, {"source": "cat", "strength": ""}]
    job = page.act("draw", item="dog", prompt="a [identifier] dog\n\n--train ", negative_prompt="snow", seed="7", num_images="2",
                   adapters=adapters, width="", subject_start="0.5")["job"]
    assert library.job(job).command["flags"] == [
        "--infer", "--model_path=library/trained/dog/output", "--image_dir=library/pictures", "--prompt=a [identifier] dog",
        "--prompt=--train", "--adapter=library/adapters/style.safetensors=0.5", "--adapter=library/trained/cat/output",
        "--negative_prompt=snow", "--num_images=2", "--seed=7", "--subject_start=0.5"]
    assert page.act("draw", item="dog", adapters=[{"source": "/etc/passwd"}])[1] == "gone"
    assert page.act("draw", item="dog", seed="-1")[:2] == (400, "program")


def test_old_drawings_are_forgotten_but_not_their_pictures(page, trained, library, monkeypatch):
    monkeypatch.setattr("webui.actions.KEPT_JOBS", 2)
    trained("dog")
    for _ in range(4):
        job = library.job(page.act("draw", item="dog")["job"])
        job.write("exit", 0)
    assert len(list(library.job_folder.iterdir())) == 3 and job.state() in ENDED


def test_each_picture_tells_what_made_it(page, trained, library):
    trained("dog")
    library.pictures.mkdir()
    text = ("a sks dog, red\nNegative prompt: snow\nSteps: 30, Sampler: DDIM, CFG scale: 4.0, Seed: 7, Size: 64x32, "
            "Subject start: 0.5, Model: library/trained/dog/output, LoRA scale: 0.8, Adapters: library/adapters/a.safetensors=0.5; other=1, "
            "Model hash: 0a1")
    db.save_picture(library.pictures, "a-7", picture(0), text)
    picture(1).save(library.pictures / "grid-a-7.png")
    picture(2).save(library.pictures / "another.png")
    (library.pictures / "broken.png").write_bytes(b"no picture")
    found = page.get("/api/pictures", count=10)
    assert found["total"] == 3
    made = next(entry for entry in found["pictures"] if entry["name"] == "a-7.png")
    assert made.items() >= {
        "prompt": "a sks dog, red", "negative_prompt": "snow", "seed": "7", "width": "64", "height": "32", "lora_scale": "0.8",
        "subject_start": "0.5", "item": "dog", "adapters": [["library/adapters/a.safetensors", "0.5"], ["other", "1"]]}.items()
    assert page.get("/api/pictures", count=1)["total"] == 3 and len(page.get("/api/pictures", count=1)["pictures"]) == 1
    assert parse_parameters("")["prompt"] == ""


def test_a_comparison_is_a_command_of_the_program(page, trained, library):
    trained("dog"), trained("cat")
    assert page.act("compare", items=[])[1] == "nothing_chosen"
    name = page.act("compare", items=["dog", "cat", "dog"], num_images="2", prompts="a [identifier] [class]")["compared"]
    assert Job(library.compared / name / "job").command["flags"] == [
        "--evaluate", "--model_path=library/trained/dog/output", "--model_path=library/trained/cat/output",
        f"--eval_dir=library/compared/{name}/evaluation", "--instance_data_dir=library/trained/dog/photos", "--num_images=2",
        f"--prompts_file=library/compared/{name}/prompts.txt"]
    assert (library.compared / name / "prompts.txt").read_text() == "a [identifier] [class]"
    picture(5).save(library.trained / "cat" / "photos" / "0.png")  # no longer those of the dog
    other = page.act("compare", items=["dog", "cat"])["compared"]
    assert not [flag for flag in Job(library.compared / other / "job").command["flags"] if "instance_data_dir" in flag]
    assert page.act("delete_compared", id=other, confirmed=other) == {}
    assert page.act("delete_compared", id=name)[1] == "really_delete"
    assert page.act("delete_compared", id=name, confirmed=name) == {} and page.get("/api/state")["compared"] == []


def test_an_export_is_given_out(page, trained, library):
    trained("dog")
    page.act("export", item="dog")
    job = next(job for job in library.jobs().values() if job.command["kind"] == "export")
    assert job.command["flags"] == ["--export=library/exported/dog.safetensors", "--model_path=library/trained/dog/output",
                                    "--overwrite"]
    library.exported.mkdir()
    (library.exported / "dog.safetensors").write_bytes(b"weights")
    (library.exported / "dog-2.safetensors").write_bytes(b"of another training")
    card = page.get("/api/state")["items"][0]
    assert [file["name"] for file in card["exported"]] == ["dog.safetensors"]
    assert page.request("GET", card["exported"][0]["url"])[2] == b"weights"


# ---- words


def test_every_word_is_there_in_english_and_chinese():
    words = json.loads((STATIC / "words.json").read_text(encoding="utf-8"))
    for word, texts in words.items():
        assert set(texts) == {"en", "zh"} and all(texts.values()), word
        assert set(re.findall(r"{\w+}", texts["en"])) == set(re.findall(r"{\w+}", texts["zh"])), word
    pages = "".join(path.read_text(encoding="utf-8") for path in STATIC.iterdir() if path.suffix in (".js", ".html"))
    python = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "webui").glob("*.py"))
    used = {word for pair in re.findall(r'data-word="(\w+)"|\bt\("(\w+)"|\bbutton\("(\w+)"', pages) for word in pair if word}
    used |= set(re.findall(r'Refusal\("(\w+)"', python)) - {"program"}
    made = set(re.findall(r"`(\w+_)\$", pages))  # "state_" of t(`state_${job.state}`)
    assert used <= words.keys(), used - words.keys()
    quoted = set(re.findall(r'"(\w+)"', pages))
    assert [word for word in words if word not in used | quoted and not any(word.startswith(start) for start in made)] == []
    for start, names in {"state_": ["waiting", "running", "stopping", *ENDED], "kind_": ["train", "draw", "compare", "export"],
                         "field_": [*FIELDS, "title"], "choice_": db.METHODS}.items():
        assert {start + name for name in names} <= words.keys()


def test_the_page_has_no_words_beside_its_table():
    html = re.sub(r"<title>.*?</title>|<h1>.*?</h1>", "", (STATIC / "index.html").read_text(encoding="utf-8"))
    assert re.sub(r"<[^>]*>", "", html).strip() == ""
    for path in STATIC.glob("*.js"):
        code = re.sub(r"^ *//.*|  //.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert re.findall(r'(?:textContent|alt|title|label|hint): "[^"]+"', code) == [], path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", code), path.name


# ---- the command line


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(*words) -> (exit status, standard error) of webui.py."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        status = main(list(words))
        return status, capsys.readouterr().err

    return call


def test_a_port_in_use(command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert command("--port", str(port)) == (2, f"error: --port {port}: in use already, or not for this user; give another\n")


@pytest.mark.parametrize("port", ["0", "70000", "-1", "x"])
def test_a_port_that_is_none(port, command, capsys):
    with pytest.raises(SystemExit) as stop:
        command("--port", port)
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_the_pages_folder_may_be_a_file(command, tmp_path):
    (tmp_path / "library").write_text("a file")
    status, err = command()
    assert status == 2 and err == "error: --library library: library is a file; give another folder\n"


def test_one_page_for_a_library(command, tmp_path):
    from filelock import FileLock

    (tmp_path / "library").mkdir()
    (tmp_path / "library" / ".address").write_text("http://127.0.0.1:7860")
    with FileLock(tmp_path / "library" / ".page.lock"):
        status, err = command()
    assert status == 2 and err.startswith("error: --library library: its page is open already, http://127.0.0.1:7860;")


def test_the_program_speaks_utf8_and_shows_a_bar(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    given = environment()
    assert (given["PYTHONUTF8"], given["PYTHONIOENCODING"], given["DREAMBOOTH_PROGRESS"]) == ("1", "utf-8:backslashreplace", "bar")
    assert given["HTTPS_PROXY"] == "http://proxy:3128"  # the program downloads through it
