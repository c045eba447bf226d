"Levels against their published values, the fitted codebook against its own optimality conditions, the error against its integral."
import pytest, torch
import bitsandbytes.functional as bnbF
from lora_nb.codebook import Codebook, fit_codebook, float4, fp4, gaussian_error, int4, integer4, lloyd_max, nf4, normal_float

PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
             0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]

def test_nf4_is_derived():
    derived = normal_float()
    assert (derived - torch.tensor(PUBLISHED)).abs().max() < 1e-6
    assert derived.dtype == torch.float32 and (derived.diff() > 0).all() and derived[7] == 0 and derived[0] == -1 and derived[15] == 1

@pytest.mark.parametrize("book", [nf4, fp4], ids=lambda b: b.name)
def test_levels_are_bitsandbytes(book): assert torch.equal(book.table(), bnbF.get_4bit_type(book.name, "cpu"))

def test_fp4_patterns():
    "s-ee-m, with one exponent step a factor of two, and the sign in the top bit."
    v = float4()
    assert torch.equal(v[8:], -v[:8]) and v.max() == 1
    assert torch.allclose(v[:8]*12, torch.tensor([0, .0625, 8, 12, 4, 6, 2, 3]))

def test_int4():
    assert torch.equal(integer4()[1:]*7, torch.arange(-7., 8.)) and 0. in integer4()
    assert (int4.nearest(torch.linspace(-1, 1, 999)) > 0).all()   # -8/7 is never nearest

def test_ties_go_down():
    for book in (nf4, fp4, int4):
        mid, order = book.bounds()
        assert torch.equal(book.nearest(mid), order[:-1]) and torch.equal(book.nearest(torch.nextafter(mid, torch.tensor(9.))), order[1:])

def test_lloyd_max_satisfies_both_conditions():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)/3
    q = lloyd_max(x, steps=3000)
    cell = torch.bucketize(x, (q[1:]+q[:-1])/2)
    means = torch.stack([x[cell == k].mean() for k in range(16)])
    assert torch.allclose(means, q, atol=1e-3)

def test_fitted_codebook_loses_least():
    w = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    def mse(book):
        b = w.view(-1, 64); s = b.abs().amax(1, keepdim=True)
        return ((book.table()[book.nearest(b/s)]*s - b)**2).mean().item()
    fitted = fit_codebook(w)
    assert mse(fitted) < min(map(mse, (nf4, fp4, int4)))
    assert fit_codebook(torch.zeros(2, 64) + torch.arange(128).view(2, 64)).levels  # few distinct values

@pytest.mark.parametrize("book", [nf4, fp4, int4], ids=lambda b: b.name)
@pytest.mark.parametrize("blocksize", [32, 64, 1024])
def test_gaussian_error_is_the_integral(book, blocksize):
    w = torch.randn(2**21, generator=torch.Generator().manual_seed(blocksize)).view(-1, blocksize)
    s = w.abs().amax(1, keepdim=True)
    measured = ((book.table()[book.nearest(w/s)]*s - w)**2).mean().item()
    assert abs(gaussian_error(book, blocksize)/measured - 1) < .01

@pytest.mark.parametrize("call, says", [
    (lambda: normal_float(offset=1.), "infinite"), (lambda: normal_float(bits=0), "2 to 8"), (lambda: Codebook("x", (1., 2.)), "expected 16"),
    (lambda: Codebook("x", (float("nan"),)*16), "not finite"), (lambda: fit_codebook(torch.full((64,), float("inf"))), "64 of 64"), (lambda: lloyd_max(torch.ones(3)), "at least 16")])
def test_errors(call, says):
    with pytest.raises(ValueError, match=says): call()
