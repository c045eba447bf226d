"The LoRA layer by itself: formula, gradients, starts, DoRA, other bases, errors."
import math
import pytest, torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D
from lora_nb.linear4bit import Linear4bit
from lora_nb.lora import (INITS, LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRALinear, OwnRows, OwnTensors, SCALINGS, thin_svd, weight_2d)
from lora_nb.quantize import NF4

@pytest.fixture(autouse=True)
def seed():
    n = torch.get_num_threads()
    torch.manual_seed(0); torch.set_num_threads(1); yield; torch.set_num_threads(n)

def shaken(layer, std=.3):
    for p in [*layer.A.values(), *layer.B.values()]: nn.init.normal_(p, std=std)
    return layer

def linear(inp=12, out=7, **kw): return nn.Linear(inp, out, **kw).requires_grad_(False)

@pytest.mark.parametrize('init', INITS)
@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_start_is_the_base_bit_for_bit(init, dora, bias):
    base = linear(bias=bias)
    x = torch.randn(3, 5, 12)
    assert torch.equal(LoRALinear(base).add(r=4, init=init, dora=dora)(x), base(x))

@pytest.mark.parametrize('init', INITS)
@pytest.mark.parametrize('scaling', SCALINGS)
def test_forward_is_W_plus_delta(init, scaling):
    layer = LoRALinear(linear()).add(r=4, alpha=6, scaling=scaling, init=init)
    with torch.no_grad():
        for p in (*layer.A.values(), *layer.B.values()): p += torch.randn_like(p)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), F.linear(x, layer.base.weight + layer.delta(), layer.base.bias), rtol=1e-4, atol=1e-4)
    s = 6/4 if scaling=='alpha/r' else 6/math.sqrt(4)
    assert layer.scaling['default'] == s
    if init == 'kaiming': torch.testing.assert_close(layer.delta(), s*layer.B['default'] @ layer.A['default'])

@pytest.mark.parametrize('init', ['kaiming', 'pissa'])
def test_gradcheck(init):
    layer = shaken(LoRALinear(linear(6, 5).double()).add(r=2, init=init))
    assert layer.A['default'].dtype == torch.float64
    f = lambda x, A, B: torch.func.functional_call(layer, {'A.default': A, 'B.default': B}, x)
    args = [torch.randn(2, 3, 6).double(), layer.A['default'].detach().clone(), layer.B['default'].detach().clone()]
    assert torch.autograd.gradcheck(f, [a.requires_grad_() for a in args])

def test_gradcheck_conv1d_and_embedding():
    layer = shaken(LoRAConv1D(Conv1D(5, 6).double().requires_grad_(False)).add(r=2))
    f = lambda x, A, B: torch.func.functional_call(layer, {'A.default': A, 'B.default': B}, x)
    args = [torch.randn(3, 6).double(), layer.A['default'].detach().clone(), layer.B['default'].detach().clone()]
    assert torch.autograd.gradcheck(f, [a.requires_grad_() for a in args])
    emb = shaken(LoRAEmbedding(nn.Embedding(6, 5).double().requires_grad_(False)).add(r=2))
    ids = torch.tensor([[0, 3, 3]])
    f = lambda A, B: torch.func.functional_call(emb, {'A.default': A, 'B.default': B}, ids)
    assert torch.autograd.gradcheck(f, [emb.A['default'].detach().clone().requires_grad_(), emb.B['default'].detach().clone().requires_grad_()])

def test_base_gets_no_gradient_and_x_does():
    layer = shaken(LoRALinear(linear()).add(r=3))
    x = torch.randn(4, 12, requires_grad=True)
    layer(x).sum().backward()
    assert layer.base.weight.grad is None and layer.A['default'].grad is not None
    want = (layer.base.weight + layer.delta()).sum(0)
    torch.testing.assert_close(x.grad, want.expand_as(x.grad), rtol=1e-5, atol=1e-5)

def test_bf16_activations_over_fp32_masters():
    layer = shaken(LoRALinear(linear().bfloat16()).add(r=3), .1)
    x = torch.randn(4, 12).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16 and layer.A['default'].dtype == torch.float32
    exact = F.linear(x.double(), layer.base.weight.double() + layer.delta().double(), layer.base.bias.double())
    assert (y.double() - exact).abs().max() < 3*2**-8*exact.abs().max()

def test_dropout_only_in_training_and_unbiased():
    layer = shaken(LoRALinear(linear()).add(r=3, dropout=.5))
    x = torch.randn(1, 12)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    want = layer(x)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    mean = layer(x.expand(20000, 12)).mean(0)
    assert (mean - want).abs().max() < .1
    kept = layer.drop('default', torch.ones(100, 12))
    assert set(kept.unique().tolist()) == {0., 2.}

def test_pissa_holds_the_top_of_W_and_olora_the_qr():
    base = linear(20, 16, bias=False)
    p = LoRALinear(base).add(r=4, alpha=2, init='pissa')
    U,S,Vh = torch.linalg.svd(base.weight)
    best = (U[:, :4]*S[:4]) @ Vh[:4]
    torch.testing.assert_close(p.scaling['default']*p.B['default'] @ p.A['default'], best, rtol=1e-4, atol=1e-5)
    o = LoRALinear(base).add(r=4, init='olora')
    B = o.B['default']
    torch.testing.assert_close(B.T @ B, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(B @ B.T @ base.weight[:, :4], base.weight[:, :4], rtol=1e-4, atol=1e-5)

def test_kaiming_and_gaussian_spread():
    base = linear(400, 8)
    A = LoRALinear(base).add(r=64).A['default']
    assert A.abs().max() <= 1/20 and abs(A.std().item()*20*3**.5 - 1) < .03
    A = LoRALinear(base).add(r=64, init='gaussian').A['default']
    assert abs(A.std().item()*64 - 1) < .03

@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('init', ['kaiming', 'pissa'])
def test_dora_is_the_normalised_sum(bias, init):
    layer = LoRALinear(linear(bias=bias)).add(r=3, alpha=5, dora=True, init=init)
    with torch.no_grad():
        for p in (*layer.A.values(), *layer.B.values()): p += .3*torch.randn_like(p)
        layer.m['default'].uniform_(.3, 2)
    V = layer.base.weight + layer.delta()
    norm = V.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.row_norm(), norm[:, 0], rtol=1e-5, atol=1e-5)
    x = torch.randn(4, 12)
    torch.testing.assert_close(layer(x), F.linear(x, layer.m['default'][:, None]*V/norm, layer.base.bias), rtol=1e-4, atol=1e-5)

def test_dora_gradients_with_the_norm_constant():
    layer = LoRALinear(linear(6, 5).double()).add(r=2, dora=True)
    shaken(layer)
    x = torch.randn(3, 6).double()
    layer(x).square().sum().backward()
    A,B,m = (d['default'].detach().clone().requires_grad_() for d in (layer.A, layer.B, layer.m))
    V = layer.base.weight + layer.scaling['default']*B @ A
    F.linear(x, (m/V.detach().norm(dim=1))[:, None]*V, layer.base.bias).square().sum().backward()
    for mine,want in ((layer.A, A), (layer.B, B), (layer.m, m)): torch.testing.assert_close(mine['default'].grad, want.grad)

def test_several_adapters_add_up_and_rows_choose():
    layer = shaken(LoRALinear(linear()).add('a', r=2).add('b', r=3))
    x = torch.randn(4, 12)
    torch.testing.assert_close(layer(x), F.linear(x, layer.base.weight + layer.delta('a') + layer.delta('b'), layer.base.bias))
    layer.rows = ['b', 'a', None, 'b']
    y = layer(x)
    layer.rows = None
    for i,on in enumerate((['b'], ['a'], [], ['b'])):
        layer.active = on
        torch.testing.assert_close(y[i], layer(x)[i])
    layer.rows = ['a']
    with pytest.raises(ValueError, match='1 adapter names were given for a batch of 4 rows'): layer(x)

def test_drop_leaves_nothing_behind():
    layer = LoRALinear(linear()).add('a', r=2, init='pissa', dora=True)
    layer.drop_adapter('a')
    assert [n for n,_ in layer.named_parameters()] == ['base.weight', 'base.bias']
    assert not layer.active and not layer.scaling and not layer.how and not layer.A0._buffers
    with pytest.raises(KeyError, match="no adapter 'a'"): layer.drop_adapter('a')
    layer.add('a', r=3)

def test_thin_svd_on_wide_and_narrow():
    for k,inp,out in ((3, 10, 8), (9, 10, 4), (5, 5, 5)):
        A,B = torch.randn(2, k, inp).double(),torch.randn(2, out, k).double()
        U,S,Vh = thin_svd(A, B)
        torch.testing.assert_close((U*S[:, None]) @ Vh, B @ A)
        torch.testing.assert_close(U.mT @ U, torch.eye(S.shape[-1]).double().expand(2, -1, -1))

def test_embedding_scale_and_untouched_tokens():
    base = nn.Embedding(10, 6)
    base.embed_scale = torch.tensor(3.)
    layer = LoRAEmbedding(base).add(r=2)
    nn.init.normal_(layer.A['default'])
    ids = torch.tensor([1, 4])
    torch.testing.assert_close(layer(ids) - base(ids), 3*layer.delta().T[ids])

@pytest.mark.parametrize('kw,text', [
    (dict(r=0), 'r, the rank, is an integer of at least 1; given 0'), (dict(r=2.), 'given 2.0'), (dict(r=True), 'given True'),
    (dict(alpha=0), 'positive'), (dict(alpha=-1), 'positive'), (dict(alpha=float('nan')), 'positive'), (dict(dropout=1.), r'\[0, 1\)'),
    (dict(scaling='r'), 'There are: alpha/r, rslora'), (dict(init='lora'), 'There are: kaiming'), (dict(name='a.b'), 'without dots'),
    (dict(name=''), 'without dots'), (dict(r=8, init='pissa'), 'Choose r ≤ 7'), (dict(r=8, init='olora'), 'Choose r ≤ 7')])
def test_errors_change_nothing(kw, text):
    layer = LoRALinear(linear())
    with pytest.raises(ValueError, match=text): layer.add(**kw)
    assert not layer.A and not layer.active and not layer.scaling

def test_name_in_use_and_embedding_limits():
    layer = LoRALinear(linear()).add(r=2)
    with pytest.raises(ValueError, match='already'): layer.add(r=2)
    e = LoRAEmbedding(nn.Embedding(4, 4))
    with pytest.raises(ValueError, match='for linear layers'): e.add(r=2, init='pissa')
    assert not e.A

@pytest.mark.parametrize('scale', [None, 2.5])
def test_dora_on_an_embedding_scales_its_features(scale):
    base = nn.Embedding(9, 6).requires_grad_(False)
    if scale: base.embed_scale = scale
    e,ids = LoRAEmbedding(base).add(r=2, alpha=3, dora=True),torch.tensor([[1, 2, 2, 8]])
    assert torch.equal(e(ids), base(ids))
    shaken(e); nn.init.uniform_(e.m['default'], .5, 2)
    V = base.weight.T + e.delta()
    want = F.embedding(ids, (e.m['default'][:,None]*V/V.norm(dim=1, keepdim=True)).T)
    if not scale: torch.testing.assert_close(e(ids), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(e.merged('default').T[ids], want, rtol=1e-5, atol=1e-5)

def test_weight_2d_of_bitsandbytes():
    bnb = pytest.importorskip('bitsandbytes')
    W = torch.randn(64, 64)
    l = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type='nf4')
    l.weight = bnb.nn.Params4bit(W, requires_grad=False, quant_type='nf4')
    l = l.to('cpu')
    got = weight_2d(l)
    assert got.shape == (64, 64) and .01 < ((got - W).norm()/W.norm()).item() < .15

@pytest.mark.parametrize('dora', [False, True])
def test_merged_is_one_product(dora):
    layer = LoRALinear(linear()).add('a', r=2, dora=dora).add('b', r=3, init='pissa')
    with torch.no_grad():
        for p in (*layer.A.values(), *layer.B.values(), *layer.m.values()): p += .2*torch.rand_like(p)
    W,x = layer.base.weight.clone(),torch.randn(5, 12)
    torch.testing.assert_close(layer(x), F.linear(x, layer.merged('a', 'b'), layer.base.bias), rtol=1e-4, atol=1e-5)
    layer.active = []
    assert torch.equal(layer(x), F.linear(x, layer.merged(), layer.base.bias)) and torch.equal(layer.base.weight, W)

@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('double', [False, True])
def test_gradcheck_over_four_bits(bias, double):
    base = Linear4bit.from_linear(linear(64, 8, bias=bias), NF4(blocksize=64, double=double))
    layer = shaken(LoRALinear(base).add(r=2, alpha=3))
    f = lambda x, A, B: torch.func.functional_call(layer, {'A.default': A, 'B.default': B}, x)
    args = [torch.randn(2, 64).double(), layer.A['default'].detach().double(), layer.B['default'].detach().double()]
    assert torch.autograd.gradcheck(f, [a.requires_grad_() for a in args])
    W = base.dequantize(torch.float64) + layer.delta().double()
    torch.testing.assert_close(f(*args), F.linear(args[0], W, None if base.bias is None else base.bias.double()), rtol=1e-5, atol=1e-5)

def test_dora_over_four_bits_has_the_formulas_gradients():
    base = Linear4bit.from_linear(linear(64, 8, bias=False), NF4(blocksize=64))
    layer = shaken(LoRALinear(base).add(r=2, dora=True))
    x = torch.randn(3, 64)
    layer(x).square().sum().backward()
    A,B,m = (d['default'].detach().clone().requires_grad_() for d in (layer.A, layer.B, layer.m))
    V = base.dequantize(torch.float32) + layer.scaling['default']*B @ A
    F.linear(x, (m/V.detach().norm(dim=1))[:, None]*V).square().sum().backward()
    for mine,want in ((layer.A, A), (layer.B, B), (layer.m, m)): torch.testing.assert_close(mine['default'].grad, want.grad, rtol=1e-3, atol=1e-3)

# --- what is not low rank ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [{}, dict(stride=2), dict(padding=1), dict(padding='same'), dict(dilation=2, padding=2), dict(stride=(1, 2), bias=False)])
@pytest.mark.parametrize('dora', [False, True])
def test_conv2d_is_one_convolution(kw, dora):
    base = nn.Conv2d(3, 6, 3, **kw).requires_grad_(False)
    layer = LoRAConv2d(base).add(r=2, alpha=3, dora=dora)
    x = torch.randn(2, 3, 9, 8)
    assert torch.equal(layer(x), base(x))
    shaken(layer)
    if dora: nn.init.uniform_(layer.m['default'], .5, 2)
    want = base._conv_forward(x, layer.merged('default').view_as(base.weight), base.bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    assert layer.A['default'].shape == (2, 27) and layer.file_shapes(base, 2) == ((2, 3, 3, 3), (6, 2, 1, 1), (1, 6, 1, 1))

def test_conv2d_gradcheck():
    layer = shaken(LoRAConv2d(nn.Conv2d(2, 3, 2, stride=2, padding=1).double().requires_grad_(False)).add(r=2))
    f = lambda x, A, B: torch.func.functional_call(layer, {'A.default': A, 'B.default': B}, x)
    args = [torch.randn(1, 2, 5, 4).double(), layer.A['default'].detach().clone(), layer.B['default'].detach().clone()]
    assert torch.autograd.gradcheck(f, [a.requires_grad_() for a in args])

@pytest.mark.parametrize('pad', [None, 3])
@pytest.mark.parametrize('scale', [None, 2.5])
def test_rows_are_an_embedding_with_those_rows(pad, scale):
    class Scaled(nn.Embedding):
        embed_scale = scale and torch.tensor(scale)
        def forward(self, ids): return super().forward(ids)*(scale or 1)
    base = Scaled(10, 6, padding_idx=pad)
    table = OwnRows(base).add('a', [7, 3, 0])
    table.active = ['a']
    ids = torch.tensor([[0, 3, 5], [7, 7, 9]])
    assert torch.equal(table(ids)[0, 2], base(ids)[0, 2])
    nn.init.normal_(table.row['a'])
    W = base.weight.detach().index_copy(0, torch.tensor([7, 3, 0]), table.row['a'].detach()).requires_grad_()
    want = F.embedding(ids, W, pad)*(scale or 1)
    assert torch.equal(table(ids), want)
    table(ids).square().sum().backward(); want.square().sum().backward()
    torch.testing.assert_close(table.row['a'].grad, W.grad[[7, 3, 0]])
    assert base.weight.grad is None or not base.weight.grad[[7, 3, 0]].any() or pad is not None

def test_own_tensors_leave_the_base_alone():
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    was = {k: v.clone() for k,v in base.state_dict().items()}
    own = OwnTensors(base).add('a').add('b', ['0.bias'])
    own.active = ['a']
    own.train()(torch.randn(8, 4)).sum().backward()
    assert all(torch.equal(v, was[k]) for k,v in base.state_dict().items())
    assert not torch.equal(own.tensors('a')['1.running_mean'], was['1.running_mean']) and own.own['a'].get_parameter('0/weight').grad is not None
    assert set(own.tensors('b')) == {'0.bias'}
    own.drop_adapter('a'); assert own.active == [] and not own.empty()
    own.drop_adapter('b'); assert own.empty()
