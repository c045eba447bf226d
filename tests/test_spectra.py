"Spectra from the factors against those of ΔW itself, and the ranks against their definitions."
import math, time
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from lora_nb.adapter import add_lora
from lora_nb.linear4bit import Linear4bit
from lora_nb.lora import LoRALinear
from lora_nb.quantize import NF4
from lora_nb.spectra import (adapter_spectra, alignment, amplification, intruders, effective_rank, energy_rank, frobenius_norm, singular_values, spectra_by_layer,
                             spectral_norm, stable_rank, subspace_similarity)

@settings(max_examples=40, deadline=None)
@given(r=st.integers(1, 12), inp=st.integers(1, 30), out=st.integers(1, 30), s=st.floats(.01, 100), seed=st.integers(0, 9999))
def test_equal_those_of_delta(r, inp, out, s, seed):
    g = torch.Generator().manual_seed(seed)
    A,B = torch.randn(r, inp, generator=g).double(),torch.randn(out, r, generator=g).double()
    got,want = singular_values(A, B, s),torch.linalg.svdvals(s*B @ A)[:min(r, inp, out)]
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10*s*100)

def test_batched_with_a_scaling_each():
    A,B,s = torch.randn(4, 3, 20),torch.randn(4, 10, 3),torch.tensor([1., 2, .5, 3])
    for i in range(4): torch.testing.assert_close(singular_values(A, B, s)[i], singular_values(A[i], B[i], s[i].item()))
    half = singular_values(A.bfloat16(), B.bfloat16())
    assert half.dtype == torch.float32

@pytest.mark.parametrize('f', [effective_rank, stable_rank, energy_rank])
def test_ranks_of_equal_values_zero_and_scale(f):
    assert f(torch.zeros(5)).item() == 0
    for k in (1, 3, 5):
        s = torch.cat([torch.ones(k), torch.zeros(5-k)])
        assert f(s, 1.) == k if f is energy_rank else abs(f(s).item() - k) < 1e-5
    s = torch.rand(6)
    torch.testing.assert_close(f(s), f(1e-3*s), rtol=1e-4, atol=0)
    batch = torch.rand(4, 6)
    assert torch.equal(f(batch), torch.stack([f(b) for b in batch]))

def test_definitions():
    s = torch.tensor([4., 2., 1., 1.])
    p = [.5, .25, .125, .125]
    assert abs(effective_rank(s).item() - math.exp(-sum(q*math.log(q) for q in p))) < 1e-5
    assert abs(stable_rank(s).item() - 22/16) < 1e-6
    assert [energy_rank(s, q).item() for q in (16/22, .73, 20/22, .95, 1.)] == [1, 2, 2, 3, 4]
    assert abs(frobenius_norm(s).item() - 22**.5) < 1e-6 and spectral_norm(s).item() == 4
    for share in (0, 1.5, 90, -.1):
        with pytest.raises(ValueError, match='share'): energy_rank(s, share)

def smol_shapes():
    cfg = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab_size=32)
    with torch.device('meta'): model = LlamaForCausalLM(cfg)
    return model.to_empty(device='cpu')

def test_all_layers_of_smollm2_in_under_a_second():
    model = smol_shapes()
    adapter = add_lora(model, r=16)
    for l in adapter.layers.values(): nn.init.normal_(l.B['default'])
    took = []
    for _ in range(5):
        t = time.perf_counter(); table = adapter_spectra(adapter); took.append(time.perf_counter() - t)
    assert len(table) == 210 and min(took) < 1, took
    for path in (table.index[0], table.index[100], table.index[-1]):
        want = torch.linalg.svdvals(adapter.layers[path].delta().double())[:16]
        torch.testing.assert_close(torch.tensor(table['values'][path]).double(), want, rtol=1e-4, atol=1e-4*want[0].item())
        assert table.frobenius[path] == pytest.approx(adapter.layers[path].delta().norm().item(), rel=1e-4)
    assert table.block.max() == 29 and set(table.module) == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}

def test_untrained_adapter_is_all_zero_and_pissa_too():
    cfg = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
    for init in ('kaiming', 'pissa'):
        t = adapter_spectra(add_lora(LlamaForCausalLM(cfg), r=4, init=init))
        assert t.spectral.max() < 1e-5
        if init=='kaiming': assert t.effective_rank.eq(0).all()

def test_spectra_by_layer_keeps_order_and_mixed_ranks():
    cfg = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
    a = add_lora(LlamaForCausalLM(cfg), r=4, rank_pattern={'q_proj': 7, 'mlp.up_proj': 2})
    s = spectra_by_layer(a)
    assert list(s) == list(a.layers) and [len(v) for v in s.values()] == list(a.ranks.values())

def test_subspace_similarity_against_the_formula():
    torch.manual_seed(0)
    one,two = ((torch.randn(r, 30).double(), torch.randn(20, r).double()) for r in (4, 6))
    for side in ('right', 'left'):
        phi = subspace_similarity(one, two, side)
        assert phi.shape == (4, 6)
        bases = []
        for A,B in (one, two):
            U,_,Vh = torch.linalg.svd(B @ A, full_matrices=False)
            bases.append(Vh.T if side=='right' else U)
        for i in range(1, 5):
            for j in range(1, 7):
                want = (bases[0][:, :i].T @ bases[1][:, :j]).norm()**2/min(i, j)
                assert abs(phi[i-1, j-1] - want) < 1e-9
    assert torch.allclose(subspace_similarity(one, one).diagonal(), torch.ones(4).double())
    with pytest.raises(ValueError, match='same layer'): subspace_similarity(one, (torch.randn(2, 9), torch.randn(20, 2)))
    with pytest.raises(ValueError, match='side'): subspace_similarity(one, two, 'up')

def test_alignment_and_amplification_by_definition():
    torch.manual_seed(0)
    W,A,B = torch.randn(20, 30).double(),torch.randn(3, 30).double(),torch.randn(20, 3).double()
    U,_,Vh = torch.linalg.svd(W, full_matrices=False)
    D = .7*B @ A
    for k in (1, 5, 20): assert abs(alignment(W, A, B, k) - ((U[:, :k].T @ D @ Vh[:k].T).norm()/D.norm())**2) < 1e-9
    u,_,v = torch.linalg.svd(D, full_matrices=False)
    assert abs(amplification(W, A, B, .7) - D.norm()/(u[:, :3].T @ W @ v[:3].T).norm()) < 1e-9
    assert alignment(W, A, 0*B, 4) == amplification(W, A, 0*B) == 0
    with pytest.raises(ValueError, match='between 1 and 20'): alignment(W, A, B, 21)

def test_intruders_are_directions_that_W_lacks():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(40, 60, bias=False)).add(r=1, alpha=1)
    U,S,Vh = torch.linalg.svd(layer.base.weight.detach(), full_matrices=False)
    assert not intruders(layer).intruder.any()
    with torch.no_grad(): layer.A['default'].copy_(Vh[30:31]); layer.B['default'].copy_(9*S[0]*U[:, 30:31])
    t = intruders(layer, k=5)
    assert not t.intruder.any() and t['best cosine'][0] > .99   # loud, but a direction of W's own
    with torch.no_grad(): layer.A['default'].copy_(nn.functional.normalize(torch.randn(1, 40), dim=1)); layer.B['default'].copy_(9*S[0]*nn.functional.normalize(torch.randn(60, 1), dim=0))
    t = intruders(layer, k=5)
    assert t.intruder.tolist() == [True, False, False, False, False] and t['singular value'][0] > 5*S[0]

def test_a_4_bit_base_is_read_as_what_it_is():
    torch.manual_seed(0)
    full = nn.Linear(64, 96, bias=False)
    packed = LoRALinear(Linear4bit.from_linear(full, NF4(double=True))).add(r=2, alpha=2)
    dense = LoRALinear(nn.Linear(64, 96, bias=False)).add(r=2, alpha=2)
    with torch.no_grad():
        dense.base.weight.copy_(packed.base.dequantize(torch.float32))
        for d in (packed, dense): d.A['default'].copy_(torch.eye(64)[:2]); d.B['default'].copy_(9*torch.eye(96)[:, :2])
    W = packed.weight_2d()
    assert not torch.equal(W, full.weight) and torch.equal(W.float(), dense.weight_2d())
    assert intruders(packed).equals(intruders(dense)) and intruders(packed).intruder.any()
    for f in (alignment, amplification): assert f(W, *packed.factors(), *([3] if f is alignment else [])) == f(dense.weight_2d(), *dense.factors(), *([3] if f is alignment else []))
