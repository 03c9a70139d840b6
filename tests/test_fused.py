"""Steps within the backward pass."""

import contextlib

import pytest
import torch
from training_runs import make_run, need, steps

import dreambooth_implementation as db


@pytest.mark.parametrize("offloads", [False, True])
def test_offloaded_states_are_brought_for_the_step_of_their_tensor_alone(offloads, tiny_model, monkeypatch):
    brought, brings, inside = [], db.brought, []

    @contextlib.contextmanager
    def watched(state, device):
        brought.append((id(state), device.type))
        inside.append(state)
        with brings(state, device):
            assert len(inside) == 1  # never two tensors' states at once
            yield
        inside.pop()
    monkeypatch.setattr(db, "brought", watched)
    run = make_run(tiny_model, levers=db.Levers(fused_backward=True, offload_optimizer=offloads))
    steps(run, 0, 2)
    tensors = len(run.groups[0].parameters)
    assert len(brought) == 2 * tensors * offloads and len(set(brought)) == tensors * offloads


def test_the_count_of_steps_stays_where_the_optimizer_keeps_it(monkeypatch):
    state, moved = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "RMS": 0.5}, []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, place: moved.append((tensor.numel(), str(place))) or tensor)
    with db.brought(state, torch.device("meta")):
        assert moved == [(2, "meta")]
    assert moved == [(2, "meta"), (2, "cpu")]


def test_the_fused_step_scales_each_tensor_down(tiny_model):
    """By AdamW one cannot see it, which forgets the scale; the norms are those before."""
    run = make_run(tiny_model, levers=db.Levers(fused_backward=True), max_grad_norm=1e-3)
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def look(parameters, limit):
        norm = clip(parameters, limit)
        norms.append((norm.item(), parameters[0].grad.norm().item(), limit))
        return norm
    torch.nn.utils.clip_grad_norm_ = look
    try:
        total = db.train_step(run, 0)[0][2]
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
    assert len(norms) == len(run.groups[0].parameters) and any(before > 1e-3 for before, *_ in norms)
    assert all(after <= limit * 1.001 == 1e-3 * 1.001 for _, after, limit in norms)
    assert total.item() == pytest.approx(sum(before ** 2 for before, *_ in norms) ** 0.5, rel=1e-4)
    assert all(p.grad is None for p in run.groups[0].parameters) and not run.grad_norms


def test_at_most_one_gradient_is_alive_in_a_fused_backward_pass():
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(5)))
    optimizer, alive, grad_norms = torch.optim.AdamW(layers.parameters(), lr=0.1), [], []
    step = optimizer.step
    optimizer.step = lambda: (alive.append(sum(p.grad is not None for p in layers.parameters())), step())
    before = [p.detach().clone() for p in layers.parameters()]
    db.fuse_backward(optimizer, 0, grad_norms)
    layers(torch.randn(2, 4)).square().mean().backward()
    assert alive == [1] * 10 == [len(optimizer.param_groups)] * 10 and len(grad_norms) == 10
    assert not any(torch.equal(p, b) for p, b in zip(layers.parameters(), before))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_bf16_weights_are_rounded_by_chance_alone(optimizer):
    """Steps below bf16's grain move the mean as fp32 would: 300 of 1e-4 from 1, where bf16 knows multiples of 2^-8."""
    need(optimizer)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    made = db.OPTIMIZERS[optimizer].make([{"params": [weight], "lr": 1e-4}], 0.0, torch.device("cpu"))
    db.fuse_backward(made, 0, [], db.Levers(optimizer, "bf16", fused_backward=True))
    place = weight.data_ptr()
    for _ in range(300):
        weight.sum().backward()
    assert weight.dtype == torch.bfloat16 and weight.grad is None and weight.data_ptr() == place
    assert {t.dtype for t in made.state[weight].values() if type(t) is torch.Tensor and t.ndim == 2} <= {torch.float32}
    assert weight.float().mean().item() == pytest.approx(1 - 300 * 1e-4, abs=2e-3)
    assert len(weight.unique()) > 3
