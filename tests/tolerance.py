"""The 2x rule: a kernel may err at most twice as much as plain torch does in the same dtype."""

import torch
from torch import Tensor


def assert_kernel_close(name: str, out: Tensor, reference: Tensor, plain: Tensor) -> None:
    """Compare `out` with `reference` (fp64), allowing twice the error of `plain`.

    Args:
        name: of the compared tensor, for the message.
        out: from the kernel.
        reference: the same in fp64.
        plain: the same from plain torch, computed in the dtype under test.
    """
    assert reference.dtype == torch.float64, "the reference has to be fp64"
    assert out.shape == reference.shape == plain.shape, f"{name}: shapes differ"
    assert torch.equal(out.isinf(), reference.isinf()), f"{name}: infinite in other places"
    finite = ~reference.isinf()
    out, reference, plain = out[finite], reference[finite], plain[finite]
    if not len(out):
        return
    rounded = reference.to(plain.dtype)
    floor = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item()
    error, allowed = ((x.double() - reference).abs().max().item() for x in (out, plain))
    allowed = 2 * allowed + floor
    print(f"{name}: error {error:.2e}, allowed {allowed:.2e}")  # noqa: T201  # pytest -s shows it
    assert error <= allowed, f"{name}: error {error:.2e} > {allowed:.2e}"
