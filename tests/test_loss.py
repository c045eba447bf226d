"The chunked loss equals transformers' own, in value and gradient, on every head that is taken for plain."
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama
from hypothesis import given, settings, strategies as st

from lora_nb.loss import causal_lm_loss, has_plain_head, model_loss


@given(st.integers(1, 3), st.integers(2, 9), st.integers(2, 40), st.integers(1, 50), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_value_and_gradients(b, n, v, chunk, seed):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(b, n, 5, dtype=torch.float64, generator=g, requires_grad=True)
    w = (torch.randn(v, 5, dtype=torch.float64, generator=g)*30).requires_grad_()
    y = torch.randint(0, v, (b, n), generator=g)
    y[torch.rand(b, n, generator=g) < .4] = -100
    y[0, -1] = 0
    ours = causal_lm_loss(h, w, y, chunk=chunk)
    theirs = F.cross_entropy((h@w.T)[:, :-1].flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    for p, q in zip(torch.autograd.grad(ours, (h, w)), torch.autograd.grad(theirs, (h, w))): assert torch.allclose(p, q, rtol=1e-5, atol=1e-9)


def models():
    import transformers as T
    kw = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, pad_token_id=0)
    yield 'llama', T.LlamaForCausalLM(T.LlamaConfig(**kw))
    yield 'qwen2', T.Qwen2ForCausalLM(T.Qwen2Config(**kw))
    yield 'qwen3', T.Qwen3ForCausalLM(T.Qwen3Config(**kw))
    yield 'mistral', T.MistralForCausalLM(T.MistralConfig(**kw))
    yield 'gemma', T.GemmaForCausalLM(T.GemmaConfig(**kw))
    yield 'phi3', T.Phi3ForCausalLM(T.Phi3Config(**kw))
    yield 'gpt2', T.GPT2LMHeadModel(T.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2))
    # these put something between hidden states and logits: the general path
    yield 'gemma2', T.Gemma2ForCausalLM(T.Gemma2Config(**kw, final_logit_softcapping=3.))
    yield 'cohere', T.CohereForCausalLM(T.CohereConfig(**kw, logit_scale=.3))
    yield 'granite', T.GraniteForCausalLM(T.GraniteConfig(**kw, logits_scaling=4.))
    yield 'phi', T.PhiForCausalLM(T.PhiConfig(**{k: v for k, v in kw.items() if k != 'head_dim'}))


@pytest.mark.parametrize('name,model', list(models()), ids=lambda x: x if isinstance(x, str) else '')
def test_whole_models(name, model):
    model.eval()
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    y = ids.clone()
    y[:, :4] = -100
    loss = model_loss(model, dict(input_ids=ids, labels=y))
    want = model(input_ids=ids, labels=y).loss
    params = [p for p in model.parameters() if p.requires_grad]
    a, b = (torch.autograd.grad(x, params, allow_unused=True) for x in (loss, want))
    assert torch.allclose(loss, want, atol=1e-5)
    for p, q in zip(a, b): assert (p is None and q is None) or torch.allclose(p, q, atol=1e-5)
    assert has_plain_head(model) == (name not in ('gemma2', 'cohere', 'granite', 'phi'))


def test_bf16_loss_is_near_the_fp32_one():
    m = tiny_llama()
    ids = torch.randint(1, 40, (4, 20))
    want = model_loss(m, dict(input_ids=ids, labels=ids)).item()
    assert model_loss(m.bfloat16(), dict(input_ids=ids, labels=ids)).item() == pytest.approx(want, rel=2e-2)


def test_large_logits_stay_finite():
    h, w = torch.full((1, 3, 4), 1e4), torch.eye(4)
    w[0] *= 2
    assert torch.isfinite(causal_lm_loss(h, w, torch.tensor([[0, 1, 1]])))


def test_no_label_is_an_error():
    with pytest.raises(ValueError, match='No labelled token'): causal_lm_loss(torch.randn(1, 3, 4), torch.randn(5, 4), torch.full((1, 3), -100))
