"""What saves memory changes nothing else."""

import pytest
import torch
from training_runs import make_run, steps, trained

import dreambooth_implementation as db


@pytest.mark.parametrize("levers", [db.Levers(fused_backward=True), db.Levers(split_batch=True),
                                    db.Levers(fused_backward=True, offload_optimizer=True),
                                    db.Levers(gradient_checkpointing=True)], ids=db.flags_of)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_levers_change_nothing_but_memory(levers, method, tiny_model):
    """Same weights after 4 steps of two photos and two class images; with a fused backward pass to the last bit."""
    options = dict(train_batch_size=2, max_grad_norm=0, train_text_encoder=True, prior_loss_weight=0.7)
    plain, saving = (make_run(tiny_model, method, "sdxl", levers=row, **options) for row in (db.Levers(), levers))
    start = trained(plain)
    measured, saved = steps(plain, 0, 4), steps(saving, 0, 4)
    torch.testing.assert_close(saved, measured, rtol=1e-4, atol=1e-6)
    plain, saving = trained(plain), trained(saving)
    if levers.fused_backward:
        assert all(torch.equal(plain[name], saving[name]) for name in plain)
    # AdamW's first steps follow signs: where a gradient is but a rounding error, a weight may go the other way
    moved, apart = (torch.cat([(plain[n] - other[n]).flatten() for n in plain]).norm() for other in (start, saving))
    assert 0 < moved and apart < 0.02 * moved
