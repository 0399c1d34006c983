import pytest
import torch
from processes import in_processes
from retrieval_models import retriever
from retrieval_processes import STEPS, VARIANTS, joint_batch, run_process, train
from safetensors.torch import load_file

from vitweave.modeling.gather import gather_rows, pad_to


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The weights and losses of two processes that trained every variant."""
    folder = tmp_path_factory.mktemp("processes")
    in_processes(run_process, folder)
    return {name: [load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1)] for name in VARIANTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_learn_what_one_learns_from_the_joint_batch(name, trained):
    alone = retriever(**VARIANTS[name][1]).train()
    start = {key: tensor.clone() for key, tensor in alone.state_dict().items()}
    losses = torch.tensor(train(alone, [joint_batch(step) for step in range(STEPS)]))
    for state in trained[name]:
        torch.testing.assert_close(state["losses"], losses, atol=1e-5, rtol=1e-5)
        for key, tensor in alone.state_dict().items():
            torch.testing.assert_close(state[key], tensor, atol=1e-6, rtol=1e-5, msg=lambda text, key=key: key + text)
    assert any(not torch.allclose(tensor, start[key], atol=1e-3) for key, tensor in alone.state_dict().items())


def test_without_other_processes_nothing_is_gathered():
    rows = torch.randn(2, 3, requires_grad=True)
    assert gather_rows(rows) is rows


def test_shorter_rows_are_padded_at_the_end():
    padded = pad_to(torch.ones(1, 2, 1), [2, 3, 1], 7)
    assert padded[..., 0].tolist() == [[1, 1, 7], [7, 7, 7]]
