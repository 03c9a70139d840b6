"""What people look at: the photo sheet and the plot of the losses."""

from PIL import Image

import dreambooth_implementation as db


def test_the_photo_sheet_shows_what_is_trained_on(train, photos, tmp_path, monkeypatch):
    seen = []

    def look(run, folder, viewer):  # before the first step
        sheet = folder / "photos.png"
        seen.append(Image.open(sheet).convert("RGB"))
        raise db.UserError("enough")

    monkeypatch.setattr(db, "optimize", look)
    status, out, _ = train()
    assert status == 2 and "photos.png" in out
    assert seen[0].size == (3 * 32 + 2, 32)
    for i, path in enumerate(sorted(photos.iterdir())):
        crop = db.fitted(db.load_image(path), (32, 32))[0]
        assert seen[0].crop((i * 33, 0, i * 33 + 32, 32)).tobytes() == crop.tobytes()


def test_the_plot_shows_both_losses():
    blue, orange = (31, 119, 180), (255, 127, 14)
    image = db.loss_plot([(1.0, 0.5)] * 60 + [(0.25, 0.5)] * 60)
    assert image.size == (800, 400)
    column = {loss: 50 + (1 - loss) * 300 for loss in (1.0, 0.5, 0.25)}  # heights of these losses, the highest on top
    for x, colour, loss in ((200, blue, 1.0), (600, blue, 0.25), (200, orange, 0.5), (600, orange, 0.5)):
        found = [y for y in range(400) if image.getpixel((x, y)) == colour]
        assert found and all(abs(y - column[loss]) <= 1 for y in found), (x, loss, found)
    alone = db.loss_plot([(0.3, None)] * 5)
    assert orange not in {colour for _, colour in alone.getcolors(10**5)}
    assert db.loss_plot([(0.0, 0.0)]).size == (800, 400)  # one step, no loss at all


def test_plot_and_summary_of_a_run(train, tmp_path):
    status, out, _ = train()
    assert status == 0 and 'Learnt "dog": "a sks dog" is the dog of the photos.' in out
    assert Image.open(tmp_path / "output" / "losses.png").size == (800, 400)
    assert Image.open(tmp_path / "output" / "photos.png").size == (98, 32)
