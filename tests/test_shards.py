"""A denoiser split over processes trains as a whole one does, keeps 1/N of it in each, and becomes an ordinary model."""

import json

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import make_run, steps

import dreambooth_implementation as db

SPLIT = db.Levers(shard=True)
TRAININGS = [("sd1", "full", "no"), ("sd1", "lora", "no"), ("z-image", "full", "no"), ("z-image", "lora", "no")]


def bytes_kept(run):
    """{"weights", "gradients", "state": bytes} of a process in the next step."""
    found, step = {}, run.optimizer.step
    parameters = [p for group in run.groups for p in group.parameters]

    def look():
        found["gradients"] = sum(db.own_share(p.grad).nbytes for p in parameters)
        step()
    run.optimizer.step = look
    db.train_step(run, 2)
    run.optimizer.step = step
    states = [value for state in run.optimizer.state.values() for value in state.values()]
    found["weights"] = sum(db.own_share(p).nbytes for p in run.models.denoiser.parameters())
    return found | {"state": sum(db.own_share(value).nbytes for value in states if value.dim())}


def both_ways(models, trainings, more):
    """In each of several processes: three steps, whole and split; what came of both and what it kept, in files of its own."""
    for family, method, precision in trainings:
        kept = {}
        for way, levers in (("whole", db.Levers()), ("split", SPLIT)):
            run = make_run(models.get, method, family, precision, levers, **more)
            rank, number = run.accelerator.process_index, run.accelerator.num_processes
            name = f"{number}-{family}-{method}-{precision}-{way}"
            measured = steps(run, 0, 2)
            kept[way] = bytes_kept(run)
            weights = {key: db.whole(parameter.detach()).clone() for key, parameter in db.trained_parameters(run.groups).items()}
            if rank == 0:
                save_file(weights | {"measured": measured}, f"{name}.safetensors")
        with open(f"{number}-{family}-{method}-{precision}-{rank}.json", "w") as file:
            json.dump(kept, file)




@pytest.mark.long
@pytest.mark.parametrize("number", [2, 4])
def test_three_steps_split_are_three_steps_whole(number, tmp_path, tiny_model):
    """Full and LoRA, in float32; and each process keeps its share alone, of the frozen base as well."""
    models = {family: tiny_model(family) for family, _, _ in TRAININGS}
    statuses, said = forked.together(number, tmp_path, both_ways, models, TRAININGS, {})
    assert statuses == [0] * number, said
    for training in TRAININGS:
        name = "-".join(map(str, (number, *training)))
        whole, split = (load_file(tmp_path / f"{name}-{way}.safetensors") for way in ("whole", "split"))
        assert whole.keys() == split.keys() and len(whole) > 20
        for key in whole:
            torch.testing.assert_close(split[key], whole[key], rtol=1e-3, atol=2e-5)
        kept = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(number)]
        for what in ("weights", "gradients", "state"):
            shares = [each["split"][what] for each in kept]
            assert sum(shares) == kept[0]["whole"][what] and max(shares) <= 1.15 * sum(shares) / number, (training, what, shares)
