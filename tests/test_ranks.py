"Ranks from first gradients: sketched spectra against true gradients, the budget kept, the model left alone."
from types import SimpleNamespace
import pytest, torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from lora_nb.adapter import TargetError, add_lora
from lora_nb.data import Sample, collate
from lora_nb.linear4bit import Linear4bit
from lora_nb.loss import model_loss
from lora_nb.quantize import NF4
from lora_nb.ranks import GradientSketch, allocate, gradient_spectra, suggest_ranks

@pytest.fixture(autouse=True, scope='module')
def one_core():
    "Matrices this small are faster on one core."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def llama(**kw):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**dict(vocab_size=40, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=.1), **kw})).eval()

def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=40, n_positions=32, initializer_range=.1, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.))

def in_4bit(model):
    for p,l in [(p, l) for p,l in model.named_modules() if isinstance(l, nn.Linear) and p!='lm_head']: model.set_submodule(p, Linear4bit.from_linear(l, NF4(), p))
    return model

def data(n=12):
    ids = torch.randint(40, (n, 10), generator=torch.Generator().manual_seed(0)).tolist()
    return SimpleNamespace(train=[Sample(x, [-100]*2+x[2:], i) for i,x in enumerate(ids)], tok=SimpleNamespace(pad_token_id=0))

@pytest.mark.parametrize('make', [llama, gpt2])
def test_spectra_equal_those_of_true_gradients(make):
    model,d = make().eval(),data()
    found = gradient_spectra(model, d, batch_size=5, k=200)
    model_loss(model, collate(d.train), sum(s.n_labels for s in d.train)).backward()
    for p,f in found.iterrows():
        true = torch.linalg.svdvals(model.get_submodule(p).weight.grad)
        assert (f['values']-true[:len(f['values'])]).abs().max() < 1e-3*true[0], p
        assert f['norm']==pytest.approx(true.square().sum().sqrt().item(), rel=.5)

def test_a_narrow_sketch_is_near_where_the_spectrum_falls():
    torch.manual_seed(1)
    U,V,s = torch.linalg.qr(torch.randn(120, 80)).Q,torch.linalg.qr(torch.randn(90, 80)).Q,torch.logspace(0, -3, 80)
    sketch = GradientSketch(120, 90, 30)
    for i in range(0, 80, 20): sketch.add(V.T[i:i+20], (U*s).T[i:i+20])
    assert sketch.Y.shape==(120, 30) and ((sketch.singular_values()-s[:30]).abs()/s[:30])[:12].max() < .1

def test_a_4_bit_base_and_a_frozen_one_are_left_as_they_were():
    model = in_4bit(llama())
    model.requires_grad_(False); model.train()
    state = {k: v.clone() for k,v in model.state_dict().items()}
    found = gradient_spectra(model, data())
    assert len(found)==14 and all(len(v) and v[0] > 0 for v in found['values'])
    assert model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(state[k], v) for k,v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())

def test_no_gradient_stays_and_what_trained_trains_again():
    model = llama()
    suggest_ranks(model, data(), r=2)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

def test_with_an_adapter_on_the_model_the_gradient_is_that_of_w():
    model = llama()
    bare = gradient_spectra(model, data(), targets='q_proj')
    add_lora(model, r=2)
    with_one = gradient_spectra(model, data(), targets='q_proj')
    for p in bare.index: assert torch.allclose(bare.loc[p, 'values'], with_one.loc[p, 'values'], rtol=1e-3, atol=1e-6)

@pytest.mark.parametrize('r', [2, 4, 7])
def test_the_budget_is_kept_and_used(r):
    model = llama()
    ranks = suggest_ranks(model, data(), r=r)
    costs = {p: sum(model.get_submodule(p).weight.shape) for p in ranks}
    spent,budget = sum(k*costs[p] for p,k in ranks.items()),r*sum(costs.values())
    assert budget-max(costs.values()) < spent <= budget and min(ranks.values())>=1 and max(ranks.values())<=4*r
    assert len(set(ranks.values())) > 1
    adapter = add_lora(model, r=r, rank_pattern=ranks)
    assert adapter.ranks==ranks and adapter.n_params==spent

def test_allocation_buys_the_best_for_the_price():
    values = {'dear': torch.tensor([10., 9., 1.]), 'cheap': torch.tensor([6., 5., .1])}
    assert allocate(values, {'dear': 20, 'cheap': 10}, 60)=={'dear': 2, 'cheap': 2}
    assert allocate(values, {'dear': 20, 'cheap': 10}, 60, most=1)=={'dear': 1, 'cheap': 1}
    best = max((sum(values['dear'][:a])+sum(values['cheap'][:b])).item() for a in range(1, 4) for b in range(1, 4) if 20*a+10*b<=60)
    assert best==30.

def test_refusals():
    m,d = llama(),data()
    for kw,words in (dict(r=0), 'r is an integer'), (dict(r=2, least=3), 'more than the budget'), (dict(r=4, most=2), 'could not be used'), (dict(r=True), 'r is an integer'):
        with pytest.raises(ValueError, match=words): suggest_ranks(m, d, **kw)
    with pytest.raises(TargetError, match='q_proj'): suggest_ranks(m, d, targets='q_prj')
    with pytest.raises(ValueError, match='No samples'): suggest_ranks(m, [])
    with pytest.raises(ValueError, match='embedding'): suggest_ranks(m, d, targets='embed_tokens')
    with pytest.raises(ValueError, match='the budget is 50'): allocate({'a': torch.ones(4)}, {'a': 100}, 50)
