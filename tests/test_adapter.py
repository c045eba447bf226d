"Adapters on whole models, with peft as the peer: equal logits both ways, equal training, strict files, nothing half changed."
import copy, json, os, re, shutil, struct, warnings
import peft, pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM
from lora_nb.adapter import (AdapterMismatch, BadAdapterFile, TargetError, UnsupportedAdapter, activate, adapters, add_lora, base_modules,
                             by_row, combine, expand, extract, find_targets, fingerprint, load_adapter, loftq, short_names, targets_preview, train_only, truncate, untie)
from lora_nb.linear4bit import Linear4bit
from lora_nb.lora import LoRALinear
from lora_nb.quantize import NF4

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Tiny matrices: threads cost more than they give."
    n = torch.get_num_threads()
    torch.set_num_threads(1); yield; torch.set_num_threads(n)

X = torch.arange(40).view(2, 20) % 96

def llama(**kw):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, tie_word_embeddings=False, initializer_range=.1), **kw})).eval()

def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=32, initializer_range=.1)).eval()

def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, num_local_experts=4, initializer_range=.1)).eval()

def swap_linears(model, make):
    for path,m in list(model.named_modules()):
        if isinstance(m, nn.Linear) and 'lm_head' not in path:
            parent,_,leaf = path.rpartition('.')
            setattr(model.get_submodule(parent), leaf, make(m))
    return model

def llama_4bit(): return swap_linears(llama(), lambda m: Linear4bit.from_linear(m, NF4(double=False)))

def llama_bnb():
    bnb = pytest.importorskip('bitsandbytes')
    def make(m):
        l = bnb.nn.Linear4bit(m.in_features, m.out_features, bias=False, compute_dtype=torch.float32, quant_type='nf4', compress_statistics=False)
        l.weight = bnb.nn.Params4bit(m.weight.data, requires_grad=False, quant_type='nf4', compress_statistics=False)
        return l
    model = swap_linears(llama(), make).to('cpu')
    model.is_loaded_in_4bit = True
    return model

@torch.no_grad()
def logits(model, x=X): return model(x).logits

def shake(params, std=.1):
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in params: p += std*torch.randn(p.shape, generator=g)

def shake_peft(model): shake([p for n,p in sorted(model.named_parameters()) if 'lora_' in n])

def close(a, b, tol=1e-4): assert ((a - b).abs().max()/b.abs().max()).item() < tol

BASES = {'llama': (llama, llama), 'gpt2': (gpt2, gpt2), 'mixtral': (mixtral, mixtral), '4-bit': (llama_4bit, llama_bnb)}
EMBED = {'llama': 'embed_tokens', 'gpt2': 'wte'}
WAYS = {'plain': ({}, {}), 'rslora': (dict(scaling='rslora'), dict(use_rslora=True)), 'dora': (dict(dora=True), dict(use_dora=True)),
        'gaussian': (dict(init='gaussian'), dict(init_lora_weights='gaussian')),
        'pissa': (dict(init='pissa'), dict(init_lora_weights='pissa')), 'olora': (dict(init='olora'), dict(init_lora_weights='olora')),
        'pissa rslora dora': (dict(init='pissa', scaling='rslora', dora=True), dict(init_lora_weights='pissa', use_rslora=True, use_dora=True)),
        'patterns': 2*(dict(rank_pattern={'q_proj|c_attn': 2, r'(layers\.1\.self_attn\.v_proj|h\.1\.mlp\.c_fc)': 3}, alpha_pattern={'q_proj|c_attn': 5}),)}

ATTENTION = ['q_proj', 'k_proj', 'v_proj', 'o_proj']  # peft's all-linear on Mixtral adapts the fused experts too (target_parameters)

def both_ways(): return [(b, w) for b in BASES for w in WAYS]

def pefts_ways():
    "Without what peft itself cannot do: PiSSA in 4 bits, OLoRA that leaves a 4-bit base alone, OLoRA on Conv1D (wrong shapes in 0.21.2)."
    return [(b, w) for b,w in both_ways() if not (b=='4-bit' and ('pissa' in w or w=='olora')) and (b, w)!=('gpt2', 'olora')]

def peft_on(base, way, **kw):
    torch.manual_seed(1)
    return get_peft_model(BASES[base][1](), LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION if base=='mixtral' else 'all-linear',
        task_type='CAUSAL_LM', fan_in_fan_out=base=='gpt2', **WAYS[way][1], **kw)).eval()

@pytest.mark.parametrize('base,way', both_ways())
@pytest.mark.filterwarnings('ignore:.*fused experts')
def test_ours_loads_in_peft(base, way, tmp_path):
    mine,theirs = BASES[base]
    model = mine()
    adapter = add_lora(model, r=4, alpha=6, **WAYS[way][0])
    before = logits(model)
    shake(adapter.parameters())
    adapter.save(tmp_path/'a')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.filterwarnings('ignore', message='.*fan_in_fan_out.*|.*Merge.*')
        peer = PeftModel.from_pretrained(theirs(), tmp_path/'a')
    close(logits(model), logits(peer))
    assert ((logits(model) - before).abs().max()/before.abs().max()) > .01

@pytest.mark.parametrize('base,way', pefts_ways())
def test_pefts_loads_here(base, way, tmp_path):
    peer = peft_on(base, way)
    shake_peft(peer)
    want = logits(peer)
    peer.save_pretrained(tmp_path/'a')
    model = BASES[base][0]()
    load_adapter(model, tmp_path/'a')
    close(logits(model), want)

def test_pefts_fused_experts_are_refused(tmp_path):
    peer = get_peft_model(mixtral(), LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM'))
    peer.save_pretrained(tmp_path/'a')
    model = mixtral()
    with pytest.raises(UnsupportedAdapter, match='target_parameters'): load_adapter(model, tmp_path/'a')
    assert not adapters(model)

@pytest.mark.parametrize('base', EMBED)
@pytest.mark.parametrize('dora', [False, True])
def test_embeddings_both_ways(base, dora, tmp_path):
    names,fresh = [EMBED[base], 'q_proj' if base=='llama' else 'c_attn'],BASES[base][0] if base=='llama' else lambda: untie(gpt2())
    adapter = add_lora(fresh(), r=4, alpha=6, targets=names, dora=dora)
    want = logits(fresh())
    assert torch.equal(logits(adapter.model), want)
    shake(adapter.parameters())
    adapter.save(tmp_path/'a')
    close(logits(adapter.model), logits(PeftModel.from_pretrained(fresh(), tmp_path/'a')))
    torch.manual_seed(1)
    peer = get_peft_model(fresh(), LoraConfig(r=4, lora_alpha=6, target_modules=names, use_dora=dora, task_type='CAUSAL_LM', fan_in_fan_out=base=='gpt2')).eval()
    start,again = peft.get_peft_model_state_dict(peer, save_embedding_layers=False),add_lora(fresh(), r=4, alpha=6, targets=names, dora=dora)
    again.load_state_dict(start)
    torch.testing.assert_close(steps(again.model, list(again.parameters())), steps(peer, trained(peer)), rtol=1e-5, atol=1e-5)
    peer.save_pretrained(tmp_path/'b', save_embedding_layers=False)
    close(logits(load_adapter(fresh(), tmp_path/'b').model), logits(peer))

def steps(model, params, n=10, labels=X):
    opt,losses = torch.optim.AdamW(params, lr=1e-3),[]
    for _ in range(n):
        loss = model(X, labels=labels).loss
        losses.append(loss.item()); loss.backward(); opt.step(); opt.zero_grad()
    return torch.tensor(losses)

@pytest.mark.parametrize('base,way', pefts_ways())
def test_ten_steps_give_pefts_losses_and_what_peft_trained_loads_here(base, way, tmp_path):
    peer,model = peft_on(base, way),BASES[base][0]()
    adapter = add_lora(model, r=4, alpha=6, targets=ATTENTION if base=='mixtral' else 'all-linear', **WAYS[way][0])
    if 'pissa' not in way and way!='olora':
        with torch.no_grad():
            start = peft.get_peft_model_state_dict(peer)
            for k,p in adapter.named_parameters(): p.copy_(start[k])
    got,want = steps(model, list(adapter.parameters())),steps(peer, [p for p in peer.parameters() if p.requires_grad])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want[-1] < want[0] - .01
    peer.save_pretrained(tmp_path/'a')
    close(logits(load_adapter(BASES[base][0](), tmp_path/'a').model), logits(peer))

@pytest.mark.parametrize('way', ['pissa', 'olora'])
def test_pefts_converted_start_loads_here(way, tmp_path):
    "PEFT's own way to save PiSSA and OLoRA as plain LoRA of twice the rank."
    peer = peft_on('llama', way)
    peer.peft_config['default'].init_lora_weights = True
    peer.save_pretrained(tmp_path/'start')
    peer.peft_config['default'].init_lora_weights = way
    steps(peer, [p for p in peer.parameters() if p.requires_grad], 3)
    want = logits(peer)
    peer.save_pretrained(tmp_path/'a', path_initial_model_for_weight_conversion=str(tmp_path/'start'))
    a = load_adapter(llama(), tmp_path/'a')
    assert set(a.ranks.values())=={8}
    close(logits(a.model), want)

def test_dropout_draws_as_pefts():
    torch.manual_seed(1)
    peer = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=6, target_modules=['q_proj'], lora_dropout=.3, task_type='CAUSAL_LM')).train()
    shake_peft(peer)
    model = llama().train()
    adapter = add_lora(model, r=4, alpha=6, targets='q_proj', dropout=.3)
    start = peft.get_peft_model_state_dict(peer)
    with torch.no_grad():
        for k,p in adapter.named_parameters(): p.copy_(start[k])
    out = []
    for m in (model, peer):
        torch.manual_seed(3); out.append(logits(m))
    close(*out)
    assert not torch.allclose(out[0], logits(model.eval()))

@pytest.mark.parametrize('base', BASES)
@pytest.mark.filterwarnings('ignore:.*fused experts')
def test_attach_disable_remove_bit_for_bit(base):
    model = BASES[base][0]()
    modules,want = base_modules(model),logits(model)
    state = {k: v.clone() for k,v in model.state_dict().items()}
    adapter = add_lora(model, r=4)
    assert torch.equal(logits(model), want)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    assert adapter.n_params == sum(p.numel() for p in adapter.parameters())
    shake(adapter.parameters())
    changed = logits(model)
    with adapter.disabled(): assert torch.equal(logits(model), want)
    with pytest.raises(ZeroDivisionError), adapter.disabled(): 1/0
    assert torch.equal(logits(model), changed) and not torch.equal(changed, want)
    adapter.remove()
    assert torch.equal(logits(model), want) and base_modules(model)==modules
    assert not any(isinstance(m, LoRALinear) for m in model.modules()) and not adapters(model)
    assert state.keys()==model.state_dict().keys() and all(torch.equal(v, state[k]) for k,v in model.state_dict().items())
    with pytest.raises(KeyError, match='not on its model'): adapter.remove()

def test_requires_grad_comes_back():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    was = {n: p.requires_grad for n,p in model.named_parameters()}
    a = add_lora(model, name='a'); b = add_lora(model, name='b')
    a.remove(); b.remove()
    assert {n: p.requires_grad for n,p in model.named_parameters()} == was

def test_all_linear_is_pefts():
    for base in ('llama', 'gpt2'):
        model,peer = BASES[base][0](),get_peft_model(BASES[base][1](), LoraConfig(target_modules='all-linear', task_type='CAUSAL_LM'))
        theirs = {n.removeprefix('base_model.model.') for n,m in peer.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        assert set(find_targets(model)) == theirs
        assert not any('lm_head' in p for p in theirs)

def test_targets():
    model = llama()
    n = lambda *a, **k: len(find_targets(model, *a, **k))
    assert (n('attention'), n('mlp'), n('q_proj'), n(['q_proj', 'mlp']), n('self_attn.q_proj')) == (8, 6, 2, 8, 2)
    assert n(r'.*layers\.1\..*_proj') == 7 and n(layers=1) == 7 and n(layers=range(2)) == 14 and n(exclude=['mlp']) == 14
    assert n(exclude=[r'.*\.mlp\..*', 'o_proj']) == 6 and n('lm_head') == 1
    assert list(find_targets(model, 'model.layers.0.mlp.up_proj')) == ['model.layers.0.mlp.up_proj']
    assert n(['embed_tokens', 'q_proj']) == 3

@pytest.mark.parametrize('targets,kw,text', [
    ('q_prj', {}, r"No module matches 'q_prj'. Nearest: 'q_proj' \(2 layers\)"), (['q_proj', 'vproj'], {}, "'vproj'. Nearest: 'v_proj'"),
    ('norm', {}, 'LlamaRMSNorm'), ([], {}, 'No targets'), ('(', {}, 'neither a name nor a regular expression'), ('q_proj', dict(layers=9), 'leaves no layer'),
    ('q_proj', dict(exclude='self_attn.q_proj'), 'leaves no layer'), ('proj', {}, 'No module matches')])
def test_target_errors(targets, kw, text):
    model = llama()
    with pytest.raises(TargetError, match=text): add_lora(model, targets=targets, **kw)
    assert not any(isinstance(m, LoRALinear) for m in model.modules()) and all(p.requires_grad for p in model.parameters())

def test_tied_head_and_fused_experts():
    tied = llama(tie_word_embeddings=True)
    assert 'lm_head' not in find_targets(tied)
    with pytest.raises(TargetError, match="'lm_head' shares its weight with 'model.embed_tokens'"): add_lora(tied, targets=['q_proj', 'lm_head'])
    assert 'lm_head' not in find_targets(tied, r'.*_proj')
    moe = mixtral()
    with pytest.warns(UserWarning, match='4 fused experts|fused experts'): assert len(find_targets(moe)) == 8
    with pytest.raises(TargetError, match='fused'): find_targets(moe, 'mlp')
    fused = next(n.split('.')[-1] for n,p in moe.named_parameters() if p.ndim==3)
    with pytest.raises(TargetError, match='fused weights of several experts'): add_lora(moe, targets=fused)

def test_preview_counts_and_changes_nothing():
    model = llama()
    before = {n: id(m) for n,m in model.named_modules()}
    table = targets_preview(model, r=4, rank_pattern={'q_proj': 2})
    assert {n: id(m) for n,m in model.named_modules()} == before
    assert table.parameters.iloc[-1] == add_lora(model, r=4, rank_pattern={'q_proj': 2}).n_params == table.parameters.iloc[:-1].sum()
    assert table.layers.iloc[-1] == 14

def test_a_failure_on_one_layer_leaves_the_model_alone():
    model = llama()
    first = add_lora(model, r=2, targets='attention', name='first')
    shake(first.parameters())
    want,ids = logits(model),{n: id(m) for n,m in model.named_modules()}
    with pytest.raises(ValueError, match=r'k_proj: init=.pissa. takes r directions'): add_lora(model, r=40, init='pissa', name='second')
    with pytest.raises(ValueError, match="already"): add_lora(model, name='first')
    with pytest.raises(TargetError, match="pattern 'nope'"): add_lora(model, name='second', rank_pattern={'nope': 2})
    assert torch.equal(logits(model), want) and {n: id(m) for n,m in model.named_modules()} == ids and list(adapters(model)) == ['first']

def test_saved_config_has_all_of_pefts_fields(tmp_path):
    add_lora(llama(), r=4).save(tmp_path/'a')
    cfg = json.loads((tmp_path/'a'/'adapter_config.json').read_text())
    theirs = LoraConfig().to_dict()
    assert cfg.keys() == theirs.keys()
    assert {k: v for k,v in cfg.items() if v!=theirs[k]}.keys() <= {'r', 'lora_alpha', 'target_modules', 'task_type', 'inference_mode', 'peft_type', 'peft_version', 'base_model_name_or_path'}
    assert sorted(cfg['target_modules']) == sorted(['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'])
    keys = load_file(tmp_path/'a'/'adapter_model.safetensors').keys()
    assert 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' in keys and len(keys) == 28

@pytest.mark.parametrize('kw', [dict(targets='attention', layers=[1]), dict(targets=['q_proj', 'up_proj'], exclude='layers.0.mlp.up_proj'),
                                dict(rank_pattern={'layers.0.mlp.up_proj': 7}, alpha_pattern={'v_proj': 2.5})])
def test_partial_targets_survive_the_file(kw, tmp_path):
    model = llama()
    adapter = add_lora(model, r=3, alpha=5, **kw)
    shake(adapter.parameters())
    adapter.save(tmp_path/'a')
    peer = PeftModel.from_pretrained(llama(), tmp_path/'a')
    close(logits(model), logits(peer))
    assert {n.removeprefix('base_model.model.') for n,m in peer.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)} == set(adapter.layers)
    again = load_adapter(llama(), tmp_path/'a')
    assert again.ranks == adapter.ranks and torch.equal(logits(again.model), logits(model))

def test_pefts_layer_choices_load_here(tmp_path):
    peer = get_peft_model(llama(), LoraConfig(r=4, target_modules=['q_proj', 'up_proj'], layers_to_transform=[1], layers_pattern='layers',
                                              exclude_modules=['mlp.up_proj'], task_type='CAUSAL_LM')).eval()
    shake_peft(peer)
    peer.save_pretrained(tmp_path/'a')
    a = load_adapter(llama(), tmp_path/'a')
    assert list(a.layers) == ['model.layers.1.self_attn.q_proj']
    close(logits(a.model), logits(peer))

def test_state_dict_round_trip_and_strictness():
    for init in ('kaiming', 'pissa'):
        a,b = add_lora(llama(), r=4, init=init),add_lora(llama(), r=4, init=init)
        shake(a.parameters())
        b.load_state_dict(a.state_dict())
        assert torch.equal(logits(a.model), logits(b.model))
        want,state = logits(b.model),{k: v + 1 for k,v in a.state_dict().items()}
        first = next(iter(state))
        for bad,text in (({k: v for k,v in state.items() if k!=first}, '1 missing'), (state | {'x': torch.zeros(1)}, '1 not expected: x'),
                         (state | {first: torch.zeros(2, 2)}, r'1 of another shape: .* \(2, 2\), expected \(4, 64\)')):
            with pytest.raises(AdapterMismatch, match=text): b.load_state_dict(bad)
            assert torch.equal(logits(b.model), want)

def test_save_is_atomic_and_keeps_other_files(tmp_path, monkeypatch):
    a = add_lora(llama(), r=4)
    folder = tmp_path/'new'/'a'
    monkeypatch.setattr(os, 'rename', lambda *_: (_ for _ in ()).throw(OSError('no space')))
    with pytest.raises(OSError): a.save(folder)
    assert not folder.exists() and list(folder.parent.iterdir()) == []
    monkeypatch.undo()
    a.save(folder)
    (folder/'README.md').write_text('mine')
    old = (folder/'adapter_model.safetensors').read_bytes()
    shake(a.parameters())
    monkeypatch.setattr('lora_nb.adapter.save_file', lambda *_, **k: (_ for _ in ()).throw(OSError('no space')))
    with pytest.raises(OSError): a.save(folder)
    assert (folder/'adapter_model.safetensors').read_bytes() == old
    monkeypatch.undo()
    a.save(folder)
    assert sorted(f.name for f in folder.iterdir()) == ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    assert torch.equal(logits(load_adapter(llama(), folder).model), logits(a.model))
    (tmp_path/'file').write_text('')
    with pytest.raises(FileExistsError): a.save(tmp_path/'file')

def test_nan_is_told_when_saving(tmp_path):
    a = add_lora(llama(), r=2)
    with torch.no_grad(): next(a.parameters())[0, 0] = float('nan')
    with pytest.warns(UserWarning, match='NaN'): a.save(tmp_path/'a')
    with pytest.raises(BadAdapterFile, match='NaN'): load_adapter(llama(), tmp_path/'a')

# --- malformed folders -------------------------------------------------------------------------------------------------

def cfg(**kw): return lambda f: (f/'adapter_config.json').write_text(json.dumps(json.loads((f/'adapter_config.json').read_text()) | kw))
def tensors(change):
    def edit(f):
        state = load_file(f/'adapter_model.safetensors')
        change(state, next(iter(sorted(state))))
        save_file(state, f/'adapter_model.safetensors')
    return edit
def raw(change):
    def edit(f): p = f/'adapter_model.safetensors'; p.write_bytes(change(p.read_bytes()))
    return edit
def text(s): return lambda f: (f/'adapter_config.json').write_bytes(s)
def put(s, k, v): s[k] = v
def huge(b): return struct.pack('<Q', 2**62) + b[8:]

FAULTS = {
    'no config': (lambda f: (f/'adapter_config.json').unlink(), FileNotFoundError, 'No adapter_config.json'),
    'no tensors': (lambda f: (f/'adapter_model.safetensors').unlink(), FileNotFoundError, 'No adapter_model.safetensors'),
    'pickle only': (lambda f: (f/'adapter_model.safetensors').rename(f/'adapter_model.bin'), FileNotFoundError, 'pickle'),
    'no folder': (shutil.rmtree, FileNotFoundError, 'no such folder'),
    'config not JSON': (text(b'{"r": 8,'), BadAdapterFile, 'not JSON'),
    'config not UTF-8': (text(b'\xff\xfe\x00'), BadAdapterFile, 'not JSON'),
    'config a list': (text(b'[1]'), BadAdapterFile, 'holds a list'),
    'r=0': (cfg(r=0), BadAdapterFile, 'r is 0'), 'r negative': (cfg(r=-4), BadAdapterFile, 'r is -4'), 'r a string': (cfg(r='4'), BadAdapterFile, "r is '4'"),
    'r wrong': (cfg(r=5), AdapterMismatch, 'another shape'), 'r huge': (cfg(r=2**40), AdapterMismatch, 'another shape'),
    'alpha negative': (cfg(lora_alpha=-1), BadAdapterFile, 'lora_alpha is -1'), 'alpha null': (cfg(lora_alpha=None), BadAdapterFile, 'lora_alpha is None'),
    'alpha NaN': (cfg(lora_alpha=float('nan')), BadAdapterFile, 'lora_alpha is nan'),
    'dropout 2': (cfg(lora_dropout=2), BadAdapterFile, 'lora_dropout is 2'),
    'pattern a list': (cfg(rank_pattern=[1]), BadAdapterFile, 'rank_pattern'), 'pattern r=0': (cfg(rank_pattern={'q_proj': 0}), BadAdapterFile, 'rank_pattern'),
    'targets a number': (cfg(target_modules=3), BadAdapterFile, 'target_modules is 3'), 'targets null': (cfg(target_modules=None), AdapterMismatch, 'fits no module'),
    'targets unknown': (cfg(target_modules=['nobody']), AdapterMismatch, 'fits no module'), 'targets bad regex': (cfg(target_modules='('), BadAdapterFile, 'regular expression'),
    'targets fewer': (cfg(target_modules=['q_proj']), AdapterMismatch, 'not expected'), 'targets more': (cfg(target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj', 'lm_head']), AdapterMismatch, 'missing'),
    'targets a norm': (cfg(target_modules=['norm']), UnsupportedAdapter, 'LlamaRMSNorm'),
    'flag a string': (cfg(use_rslora='yes'), BadAdapterFile, 'use_rslora'), 'dora without magnitude': (cfg(use_dora=True), AdapterMismatch, 'lora_magnitude_vector'),
    'not LoRA': (cfg(peft_type='IA3'), UnsupportedAdapter, "'IA3'"), 'bias': (cfg(bias='some'), BadAdapterFile, 'bias'),
    'modules_to_save without tensors': (cfg(modules_to_save=['lm_head']), AdapterMismatch, 'missing: base_model.model.lm_head.weight'),
    'modules_to_save unknown': (cfg(modules_to_save=['nobody']), UnsupportedAdapter, 'nobody'), 'modules_to_save a number': (cfg(modules_to_save=3), BadAdapterFile, 'modules_to_save'),
    'token rows missing': (cfg(trainable_token_indices=[3]), AdapterMismatch, 'trainable_tokens_delta'), 'token ids strings': (cfg(trainable_token_indices=['a']), BadAdapterFile, 'trainable_token_indices'),
    'token ids out of range': (lambda f: (cfg(trainable_token_indices=[96])(f), tensors(lambda s, k: put(s, 'base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta', torch.zeros(1, 64)))(f)), ValueError, 'vocabulary of 96'),
    'aLoRA': (cfg(alora_invocation_tokens=[1]), UnsupportedAdapter, 'alora'),
    'loftq': (cfg(init_lora_weights='loftq'), UnsupportedAdapter, 'loftq'), 'init a number': (cfg(init_lora_weights=3), UnsupportedAdapter, 'init_lora_weights=3'),
    'tensor missing': (tensors(lambda s, k: s.pop(k)), AdapterMismatch, '1 missing'), 'tensor extra': (tensors(lambda s, k: put(s, 'x.lora_A.weight', torch.zeros(2))), AdapterMismatch, '1 not expected'),
    'wrong shape': (tensors(lambda s, k: put(s, k, torch.zeros(4, 63))), AdapterMismatch, r'\(4, 63\), expected \(4, 64\)'),
    'transposed': (tensors(lambda s, k: put(s, k, s[k].T.contiguous())), AdapterMismatch, 'another shape'),
    'integers': (tensors(lambda s, k: put(s, k, s[k].int())), BadAdapterFile, 'int32'), 'NaN': (tensors(lambda s, k: put(s, k, s[k]*float('nan'))), BadAdapterFile, 'NaN'),
    'infinity': (tensors(lambda s, k: put(s, k, s[k] + float('inf'))), BadAdapterFile, 'NaN or infinity'), 'empty': (tensors(lambda s, k: s.clear()), AdapterMismatch, '16 missing'),
    'path traversal': (tensors(lambda s, k: put(s, '../../etc/passwd.lora_A.weight', torch.zeros(4, 64))), AdapterMismatch, 'not expected'),
    'twice': (tensors(lambda s, k: put(s, k.replace('.weight', '.default.weight'), s[k].clone())), BadAdapterFile, 'twice'),
    'truncated': (raw(lambda b: b[:-7]), BadAdapterFile, 'whole safetensors'), 'no bytes': (raw(lambda b: b''), BadAdapterFile, 'whole safetensors'),
    'huge header': (raw(huge), BadAdapterFile, 'whole safetensors'), 'noise': (raw(lambda b: bytes(range(256))*8), BadAdapterFile, 'whole safetensors'),
    'a pickle inside': (raw(lambda b: b'\x80\x04\x95' + b), BadAdapterFile, 'whole safetensors'),
}

BEYOND = {'aLoRA': dict(alora_invocation_tokens=[1]), 'Arrow': dict(arrow_config=dict(top_k=2)), 'CorDA': dict(init_lora_weights='corda'), 'LoRA-GA': dict(init_lora_weights='lora_ga'),
          'QALoRA': dict(use_qalora=True), 'BD-LoRA': dict(use_bdlora=dict(target_modules_bd_a=['q_proj'])), 'KaSA': dict(kasa_config=dict(beta=.1)), 'VeLoRA': dict(velora_config=dict(num_groups=2)),
          'MonteCLoRA': dict(monteclora_config=dict(mc_samples=4)), 'layer replication': dict(layer_replication=[[0, 2], [0, 2]]), 'Megatron': dict(megatron_config=dict(fp16=True)),
          'fused experts': dict(target_parameters=['experts.down_proj']), "biases of A and B": dict(lora_bias=True)}

@pytest.mark.parametrize('what', BEYOND)
def test_pefts_other_options_are_refused_by_name(what, good, tmp_path):
    assert BEYOND[what].keys() <= LoraConfig().to_dict().keys()   # they are PEFT's
    folder,model = shutil.copytree(good, tmp_path/'a'),llama()
    cfg(**BEYOND[what])(folder)
    (field,value), = BEYOND[what].items()
    with pytest.raises(UnsupportedAdapter, match=re.escape(f'{field}={value!r}')): load_adapter(model, folder)
    assert not adapters(model)

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    a = add_lora(llama(), r=4, targets='attention')
    shake(a.parameters())
    return a.save(tmp_path_factory.mktemp('good')/'a')

@pytest.mark.parametrize('fault', FAULTS)
def test_malformed_folder(fault, good, tmp_path):
    spoil,error,words = FAULTS[fault]
    folder = shutil.copytree(good, tmp_path/'a')
    spoil(folder)
    model = llama()
    ids,want = {n: id(m) for n,m in model.named_modules()},logits(model)
    with pytest.raises(error, match=words): load_adapter(model, folder)
    assert {n: id(m) for n,m in model.named_modules()} == ids and torch.equal(logits(model), want)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())

def test_other_base_is_told(good):
    with pytest.raises(AdapterMismatch, match='trained on a base of other shapes'): load_adapter(llama(hidden_size=32), good)
    with pytest.warns(UserWarning, match='other shapes'): load_adapter(llama(vocab_size=100), good)
    assert fingerprint(llama()) == fingerprint(llama_4bit()) != fingerprint(llama(hidden_size=32))

def test_unknown_fields_are_kept(good, tmp_path):
    folder = shutil.copytree(good, tmp_path/'a')
    cfg(shiny_new_thing=3)(folder)
    with pytest.warns(UserWarning, match='shiny_new_thing'): a = load_adapter(llama(), folder)
    a.save(tmp_path/'b')
    assert json.loads((tmp_path/'b'/'adapter_config.json').read_text())['shiny_new_thing'] == 3

@pytest.mark.parametrize('rename', [lambda k: k.removeprefix('base_model.model.'), lambda k: k.replace('.weight', '.default.weight')])
def test_older_key_layouts(rename, good, tmp_path):
    folder = shutil.copytree(good, tmp_path/'a')
    save_file({rename(k): v for k,v in load_file(good/'adapter_model.safetensors').items()}, folder/'adapter_model.safetensors')
    assert torch.equal(logits(load_adapter(llama(), folder).model), logits(load_adapter(llama(), good).model))

def llava():
    "A tiny model whose language model moved from language_model.model to model.language_model in transformers."
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
    torch.manual_seed(0)
    text = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, initializer_range=.1)
    eyes = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=eyes, text_config=text, image_token_index=95)).eval()

def test_modules_that_moved_are_found_as_peft_finds_them(tmp_path):
    peer = get_peft_model(llava(), LoraConfig(r=4, target_modules=['q_proj', 'up_proj'])).eval()
    shake_peft(peer)
    want = logits(peer)
    peer.save_pretrained(tmp_path/'new')
    old = shutil.copytree(tmp_path/'new', tmp_path/'old')
    back = lambda k: k.replace('model.model.language_model.', 'model.language_model.model.').replace('model.model.vision_tower.', 'model.vision_tower.')
    state = {back(k): v for k,v in load_file(old/'adapter_model.safetensors').items()}
    assert any('base_model.model.language_model.model.layers.1' in k for k in state) and not any('base_model.model.model.' in k for k in state)
    save_file(state, old/'adapter_model.safetensors', metadata={'format': 'pt'})
    close(logits(PeftModel.from_pretrained(llava(), old)), want)
    for folder in ('new', 'old'): close(logits(load_adapter(llava(), tmp_path/folder).model), want)

def test_single_experts_are_refused_by_name(good, tmp_path):
    folder,model = shutil.copytree(good, tmp_path/'a'),mixtral()
    tensors(lambda s, k: put(s, 'base_model.model.model.layers.0.block_sparse_moe.experts.1.w2.lora_A.weight', torch.zeros(4, 96)))(folder)
    with pytest.raises(UnsupportedAdapter, match=r'experts\.1\.w2, a single expert.*fused'): load_adapter(model, folder)
    assert not adapters(model)

# --- many adapters -----------------------------------------------------------------------------------------------------

@pytest.fixture
def pair():
    model = llama()
    for name,kw in (('a', dict(targets='attention', r=4, alpha=6)), ('b', dict(targets=['q_proj', 'mlp'], r=4, alpha=3))):
        shake(add_lora(model, name=name, **kw).parameters())
    return model

def alone(model, *names):
    activate(model, *names)
    return logits(model)

def test_switching_is_bit_for_bit(pair):
    base,a,b = alone(pair),alone(pair, 'a'),alone(pair, 'b')
    assert torch.equal(base, logits(llama())) and torch.equal(alone(pair, 'a'), a) and not torch.equal(a, b)
    both = alone(pair, 'a', 'b')
    assert not torch.equal(both, a) and not torch.equal(both, b)
    with adapters(pair)['b'].disabled(): assert torch.equal(logits(pair), a)
    with pytest.raises(KeyError, match="No adapter 'c'"): activate(pair, 'c')
    assert torch.equal(logits(pair), both)
    adapters(pair)['b'].remove()
    assert torch.equal(logits(pair), a) and list(adapters(pair)) == ['a']

def test_one_trains_while_another_stays_on(pair):
    activate(pair, 'a', 'b'); train_only(pair, 'b')
    frozen = [p.detach().clone() for p in adapters(pair)['a'].parameters()]
    losses = steps(pair, [p for p in pair.parameters() if p.requires_grad])
    assert losses[-1] < losses[0] and all(torch.equal(p, q) for p,q in zip(frozen, adapters(pair)['a'].parameters()))

def test_rows_of_a_batch(pair):
    x = X.repeat(2, 1)
    with by_row(pair, ['a', 'b', None, 'a']): mixed = logits(pair, x)
    for i,names in enumerate((['a'], ['b'], [], ['a'])): close(mixed[i], alone(pair, *names)[i % 2], 1e-5)
    with pytest.raises(KeyError), by_row(pair, ['z']): pass
    with pytest.raises(ValueError, match='1 adapter names'), by_row(pair, ['a']): logits(pair)
    logits(pair)

@pytest.mark.parametrize('how', ['cat', 'linear', 'svd'])
def test_combinations_equal_pefts(how, tmp_path):
    model = llama()
    for i,n in enumerate('ab'):
        shake(add_lora(model, name=n, r=4, alpha=6+i, targets='attention').parameters(), .1 + .05*i)
        adapters(model)[n].save(tmp_path/n)
    peer = PeftModel.from_pretrained(llama(), tmp_path/'a', 'a')
    peer.load_adapter(tmp_path/'b', 'b')
    peer.add_weighted_adapter(['a', 'b'], [.7, -.4], 'sum', combination_type=how, **(dict(svd_rank=3) if how=='svd' else {}))
    peer.set_adapter('sum')
    combine(model, {'a': .7, 'b': -.4}, 'sum', how, r=3 if how=='svd' else None)
    close(logits(model), logits(peer))

def test_cat_is_exact_and_errors(pair):
    c = combine(pair, {'a': 1., 'b': 1.}, 'c')
    close(logits(pair), alone(pair, 'a', 'b'), 1e-5)
    for kw,error in ((dict(weights={'z': 1.}), KeyError), (dict(weights={}), ValueError), (dict(weights={'a': 1.}, how='svd'), ValueError), (dict(weights={'a': 1.}, how='ties'), ValueError)):
        with pytest.raises(error): combine(pair, name='d', **kw)
    d = add_lora(pair, r=2, dora=True, name='e')
    with pytest.raises(ValueError, match='DoRA'): combine(pair, {'e': 1.}, 'd')
    assert list(adapters(pair)) == ['a', 'b', 'c', 'e']

# --- rank surgery ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [{}, dict(init='pissa'), dict(dora=True), dict(scaling='rslora')])
def test_truncation_error_is_the_tail(kw):
    a = add_lora(llama(), r=8, alpha=6, targets='attention', **kw)
    shake(a.parameters())
    want,deltas = logits(a.model),{p: l.delta().double() for p,l in a.layers.items()}
    full = max(a.layers[next(iter(a.layers))].factors()[0].shape[0], 8)
    truncate(a, full)
    close(logits(a.model), want, 1e-6 if not kw else 5e-6)
    report = truncate(a, 3)
    for p,l in a.layers.items():
        S = torch.linalg.svdvals(deltas[p])
        tail,cut = S[3:].norm(),(l.delta().double() - deltas[p]).norm()
        assert abs(cut - tail) < 1e-5*S[0]
        assert abs(report.cut[p] - (tail/S.norm()).item()) < 1e-4 and report['rank after'][p] == 3
    assert set(a.ranks.values()) == {3}

def test_truncate_tells_the_loss_before_and_after():
    a = add_lora(llama(), r=8, targets='attention')
    shake(a.parameters(), .3)
    loss = lambda: a.model(X, labels=X).loss
    before = loss().item()
    table = truncate(a, 1, loss=loss)
    assert table.attrs=={'loss_before': before, 'loss_after': loss().item()} and abs(table.attrs['loss_after']-before) > 1e-3
    assert not truncate(a, 1).attrs

def test_truncate_by_energy_and_by_layer(tmp_path):
    a = add_lora(llama(), r=8, targets='attention')
    for l in a.layers.values():
        nn.init.normal_(l.A['default'], std=.1); nn.init.normal_(l.B['default'], std=.1)
        with torch.no_grad(): l.B['default'] *= torch.logspace(0, -2, 8)
    deltas = {p: l.delta() for p,l in a.layers.items()}
    report = truncate(a, energy=.99)
    assert (report.cut**2 <= .01 + 1e-6).all() and (report['rank after'] < 8).all()
    for p,d in deltas.items():
        S = torch.linalg.svdvals(d.double()).square()
        assert report['rank after'][p] == int((S.cumsum(0) < .99*S.sum()).sum()) + 1
    first = next(iter(a.layers))
    truncate(a, {first: 1})
    assert a.ranks[first] == 1
    a.save(tmp_path/'a')
    close(logits(a.model), logits(PeftModel.from_pretrained(llama(), tmp_path/'a')))
    again = load_adapter(llama(), tmp_path/'a')
    assert again.ranks == a.ranks
    for bad in (dict(), dict(rank=2, energy=.9), dict(energy=90), dict(rank=0), dict(rank={first: 0})):
        with pytest.raises(ValueError): truncate(a, **bad)
    with pytest.raises(KeyError): truncate(a, {'nobody': 2})
    assert again.ranks == a.ranks

@pytest.mark.parametrize('kw', [{}, dict(init='pissa'), dict(dora=True), dict(scaling='rslora')])
def test_expand_keeps_the_function_and_learns(kw, tmp_path):
    a = add_lora(llama(), r=3, alpha=6, targets='attention', **kw)
    shake(a.parameters())
    want = logits(a.model)
    assert set(expand(a, 9).ranks.values()) == {9}
    close(logits(a.model), want, 1e-5)
    a.save(tmp_path/'a')
    close(logits(PeftModel.from_pretrained(llama(), tmp_path/'a')), want)
    steps(a.model, list(a.parameters()), 3)
    assert all(l.B['default'][:, -1].any() for l in a.layers.values())
    with pytest.raises(ValueError, match='at least that'): expand(a, 4)

def test_gradient_checkpointing_and_generate():
    model = llama()
    a = add_lora(model, r=4)
    shake(a.parameters())
    model(X, labels=X).loss.backward()
    want = [p.grad.clone() for p in a.parameters()]
    model.zero_grad(); model.train(); model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model(X, labels=X).loss.backward()
    for p,g in zip(a.parameters(), want): torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)
    model.eval()
    assert model.generate(X[:, :5], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 8)

def test_deepcopy_is_independent():
    model = llama()
    a = add_lora(model, r=4)
    twin = copy.deepcopy(model)
    shake(adapters(twin)['default'].parameters())
    assert adapters(twin)['default'].model is twin and not torch.equal(logits(twin), logits(model))
    adapters(twin)['default'].remove()
    assert torch.equal(logits(twin), logits(model))

# --- extraction --------------------------------------------------------------------------------------------------------

def test_extract_recovers_a_merged_adapter():
    model,tuned = llama(),llama()
    a = add_lora(tuned, r=3, targets='attention')
    shake(a.parameters())
    merged = {p: l.merged('default') for p,l in a.layers.items()}
    want = logits(tuned)
    a.remove()
    for p,W in merged.items(): base_modules(tuned)[p].weight.data = W
    close(logits(tuned), want, 1e-5)
    found,report = extract(model, tuned, energy=1 - 1e-7)
    close(logits(model), want)
    for p,r in found.ranks.items(): assert r == (3 if p in merged else 1), p
    assert (report['left out'] < 1e-3).all() and (report.difference[[p for p in report.index if p not in merged]] == 0).all()
    found.remove()
    _,report = extract(model, tuned, rank=1, targets=['q_proj'])
    assert set(report[report.kind=='no adapter'].index) == {f'{p}.weight' for p in merged if 'q_proj' not in p}
    p = 'model.layers.0.self_attn.q_proj'
    S = torch.linalg.svdvals((merged[p] - base_modules(model)[p].weight).double())
    assert report['left out'][p] == pytest.approx((S[1:].norm()/S.norm()).item(), abs=1e-4)

def test_extract_refuses_other_architectures():
    model = llama()
    for kw in (dict(rank=2, energy=.5), dict(), dict(rank=0), dict(energy=2)):
        with pytest.raises(ValueError): extract(model, llama(), **kw)
    with pytest.raises(ValueError, match='differ in'): extract(model, llama(intermediate_size=80), rank=2)
    assert not adapters(model)

# --- what trains in full -----------------------------------------------------------------------------------------------

def biased(**kw):
    model = llama(attention_bias=True, mlp_bias=True, **kw)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n,p in model.named_parameters():
            if n.endswith('bias'): p.copy_(.1*torch.randn(p.shape, generator=g))
    return model

def seq_cls():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, num_labels=3, pad_token_id=0, initializer_range=.1)).eval()

def tied(): return llama(tie_word_embeddings=True)

IDS = [5, 90, 17]
FULL = {  # base, what ours and PEFT's are given, modules beside the LoRA layers
    'rows': (llama, dict(trainable_token_indices=IDS)), 'rows, tied': (tied, dict(trainable_token_indices=IDS)), 'rows, gpt2': (gpt2, dict(trainable_token_indices=IDS)),
    'rows of both': (llama, dict(trainable_token_indices={'embed_tokens': IDS, 'lm_head': [1, 5]})),
    'rows of both, tied': (tied, dict(trainable_token_indices={'embed_tokens': IDS, 'lm_head': IDS})),
    'head and norm': (llama, dict(modules_to_save=['lm_head', 'model.norm'])), 'score': (seq_cls, dict(modules_to_save=['score'])),
    'embedding': (llama, dict(modules_to_save=['embed_tokens'])),
    'bias all': (biased, dict(bias='all')), 'bias lora_only': (biased, dict(bias='lora_only')), 'bias gpt2': (gpt2, dict(bias='all')),
    'bias dora': (biased, dict(bias='lora_only', dora=True)), 'rows and norm': (tied, dict(trainable_token_indices=IDS, modules_to_save=['model.norm'])),
}

def in_full(case, **kw):
    make,kw2 = FULL[case]
    return make,['c_attn'] if make is gpt2 else ['q_proj', 'up_proj'],dict(kw2, **kw)

def their_full(case):
    make,targets,kw = in_full(case)
    torch.manual_seed(1)
    if kw.pop('dora', False): kw['use_dora'] = True
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return get_peft_model(make(), LoraConfig(r=4, lora_alpha=6, target_modules=targets, fan_in_fan_out=make is gpt2, **kw)).eval()

def trained(peer): return [p for p in peer.parameters() if p.requires_grad]

@pytest.mark.parametrize('case', FULL)
def test_in_full_loads_in_peft(case, tmp_path):
    make,targets,kw = in_full(case)
    model = make()
    before = logits(model)
    a = add_lora(model, r=4, alpha=6, targets=targets, **kw)
    assert torch.equal(logits(model), before) and a.own
    shake(a.parameters())
    want = logits(model)
    a.save(tmp_path/'a')
    peer = PeftModel.from_pretrained(make(), tmp_path/'a').eval()
    close(want, logits(peer))
    again = load_adapter(make(), tmp_path/'a')
    assert torch.equal(logits(again.model), want) and again.beyond==a.beyond and again.n_params==a.n_params
    with a.disabled(): assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), want)
    modules = base_modules(make())
    a.remove()
    assert torch.equal(logits(model), before) and [n for n,_ in model.named_modules()][1:]==list(modules)
    assert all(p.requires_grad for p in model.parameters())

@pytest.mark.parametrize('case', FULL)
def test_pefts_in_full_loads_here(case, tmp_path):
    peer = their_full(case)
    shake(trained(peer))
    want = logits(peer)
    peer.save_pretrained(tmp_path/'a')
    model = in_full(case)[0]()
    a = load_adapter(model, tmp_path/'a')
    close(logits(model), want)
    assert a.n_params == sum(p.numel() for p in trained(peer))
    # every tensor counts
    state = {k: v.clone() for k,v in a.state_dict().items()}
    for k in dict(a.own_tensors()):
        a.load_state_dict({**state, k: state[k] + .5})
        assert not torch.equal(logits(model), want), k

@pytest.mark.parametrize('case', FULL)
def test_in_full_ten_steps_give_pefts_losses(case):
    peer = their_full(case)
    make,targets,kw = in_full(case)
    a = add_lora(make(), r=4, alpha=6, targets=targets, **kw)
    start = {k: v for k,v in peft.get_peft_model_state_dict(peer, save_embedding_layers=False).items()}
    state = a.state_dict()
    assert set(state) <= set(start)
    a.load_state_dict({k: start[k] for k in state})
    labels = torch.tensor([1, 2]) if make is seq_cls else X
    got,want = steps(a.model, list(a.parameters()), labels=labels),steps(peer, trained(peer), labels=labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want[-1] < want[0] - .01

def test_own_tensors_are_in_state_and_checkpoints():
    a,b = (add_lora(biased(), r=2, targets='q_proj', bias='all', modules_to_save='lm_head', trainable_token_indices=IDS) for _ in range(2))
    shake(a.parameters())
    assert {k for k,_ in a.named_parameters()} == set(a.state_dict()) and len(a.state_dict()) == 4 + 14 + 1 + 1
    b.load_state_dict(a.state_dict())
    assert torch.equal(logits(a.model), logits(b.model))
    assert {id(p) for p in a.parameters()} == {id(p) for p in a.model.parameters() if p.requires_grad}
    with pytest.raises(AdapterMismatch, match='1 missing: .*trainable_tokens_delta'): b.load_state_dict({k: v for k,v in a.state_dict().items() if 'tokens' not in k})
    losses = steps(a.model, list(a.parameters()))
    assert losses[-1] < losses[0]

def test_replaced_tensors_are_the_models():
    for case in FULL:
        make,targets,kw = in_full(case)
        if kw.get('dora'): continue
        a = add_lora(make(), r=2, targets=targets, **kw)
        shake([p for k,p in a.named_parameters() if 'lora_' not in k])
        plain = make()
        for n,t in a.replaced().items():
            p = dict(plain.named_parameters())[n]
            p.data.copy_(t)
        close(logits(plain), logits(a.model), 1e-5)

def test_own_tensors_switch_with_their_adapter():
    model = tied()
    base = logits(model)
    a = add_lora(model, r=2, targets='q_proj', name='a', trainable_token_indices=IDS); shake(a.parameters()); la = logits(model)
    b = add_lora(model, r=2, targets='q_proj', name='b', trainable_token_indices=[5]); shake(b.parameters(), .2); lb = logits(model)
    c = add_lora(model, r=2, targets='v_proj', name='c'); shake(c.parameters())
    assert torch.equal(alone(model, 'a'), la) and torch.equal(alone(model, 'b'), lb) and torch.equal(alone(model), base)
    lac = alone(model, 'a', 'c')
    with pytest.raises(ValueError, match="'a' and 'b' each hold tensors"): activate(model, 'a', 'b')
    assert torch.equal(logits(model), lac)
    with pytest.raises(ValueError, match='cannot differ by row'), by_row(model, ['a', None]): pass
    with by_row(model, ['c', None]): mixed = logits(model)
    close(mixed[0], alone(model, 'c')[0], 1e-5); close(mixed[1], base[1], 1e-5)
    with pytest.raises(ValueError, match='no weighted sum'): combine(model, {'a': 1., 'c': 1.}, 'd')
    twin = copy.deepcopy(model)
    shake(adapters(twin)['a'].parameters())
    assert torch.equal(alone(model, 'a'), la) and not torch.equal(alone(twin, 'a'), la)
    a.remove(); assert torch.equal(alone(model, 'b'), lb)
    b.remove(); c.remove(); assert torch.equal(logits(model), base) and not any(hasattr(m, 'base') for m in model.modules())

def test_in_full_over_4_bits(tmp_path):
    model = llama_4bit()
    a = add_lora(model, r=4, modules_to_save=['lm_head', 'norm'], trainable_token_indices=IDS)
    shake(a.parameters())
    a.save(tmp_path/'a')
    close(logits(model), logits(PeftModel.from_pretrained(llama_bnb(), tmp_path/'a')))
    with pytest.raises(ValueError, match='packed in 4 bits'): add_lora(llama_4bit(), modules_to_save='q_proj')

def test_gradients_in_bf16_have_fp32_masters():
    model = llama().bfloat16()
    a = add_lora(model, r=2, targets='q_proj', modules_to_save=['lm_head', 'norm'], trainable_token_indices=IDS)
    assert {p.dtype for p in a.parameters()} == {torch.float32} and model(X).logits.dtype==torch.bfloat16
    model(X, labels=X).loss.backward()
    assert all(p.grad is not None and p.grad.dtype==torch.float32 for p in a.parameters())

@pytest.mark.parametrize('make,kw,text', [
    (llama, dict(trainable_token_indices=[96]), 'vocabulary of 96'), (llama, dict(trainable_token_indices=[1, 1]), 'distinct'),
    (llama, dict(trainable_token_indices=[-1]), 'vocabulary of 96'), (llama, dict(trainable_token_indices={'nope': [1]}), 'fits 0 modules'),
    (llama, dict(trainable_token_indices={'norm': [1]}), 'LlamaRMSNorm|fits'), (tied, dict(trainable_token_indices={'lm_head': [1]}), 'Give one list'),
    (tied, dict(trainable_token_indices={'embed_tokens': [1], 'lm_head': [2]}), 'Give one list'),
    (llama, dict(trainable_token_indices=[1], modules_to_save=['embed_tokens']), 'named twice'),
    (llama, dict(modules_to_save=['lm_haed']), "Nearest: 'lm_head'"), (llama, dict(modules_to_save=['layers']), 'never called'),
    (llama, dict(modules_to_save=['self_attn', 'v_proj']), 'inside another'), (tied, dict(modules_to_save=['lm_head']), r'untie\(model\)'),
    (tied, dict(modules_to_save=['embed_tokens']), r'untie\(model\)'), (llama, dict(bias='some'), 'lora_only'), (llama, dict(bias='all'), 'no bias to train'),
    (llama, dict(modules_to_save=['q_proj']), 'no layer is left'), (tied, dict(targets=['embed_tokens']), r'untie\(model\)'), (tied, dict(targets=['lm_head']), r'untie\(model\)')])
def test_in_full_errors_change_nothing(make, kw, text):
    model = make()
    want,ids = logits(model),{n: id(m) for n,m in model.named_modules()}
    with pytest.raises(ValueError, match=text): add_lora(model, r=2, **{'targets': 'q_proj', **kw})
    assert torch.equal(logits(model), want) and {n: id(m) for n,m in model.named_modules()}==ids and all(p.requires_grad for p in model.parameters())

def test_pefts_tied_targets_are_told(tmp_path):
    for where in ('lm_head', 'embed_tokens'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            peer = get_peft_model(tied(), LoraConfig(r=4, target_modules=['q_proj', where])).eval()
            shake_peft(peer); want = logits(peer)
            peer.save_pretrained(tmp_path/where)
        with pytest.warns(UserWarning, match=f"adapts '.*{where}', which shares its weight"): a = load_adapter(tied(), tmp_path/where)
        close(logits(a.model), want)
        cfg(ensure_weight_tying=True)(tmp_path/where)
        with pytest.raises(UnsupportedAdapter, match='ensure_weight_tying'): load_adapter(tied(), tmp_path/where)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        get_peft_model(tied(), LoraConfig(r=4, target_modules=['q_proj'], modules_to_save=['lm_head'])).save_pretrained(tmp_path/'s')
    with pytest.raises(UnsupportedAdapter, match=r'untie\(model\)'): load_adapter(tied(), tmp_path/'s')
    load_adapter(untie(tied()), tmp_path/'s')
    other = llama(); other.model.embed_tokens.weight.data += 1
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        get_peft_model(llama(), LoraConfig(r=4, target_modules=['embed_tokens'])).save_pretrained(tmp_path/'e')
    load_adapter(llama(), tmp_path/'e')
    with pytest.raises(AdapterMismatch, match='base_layer.weight'): load_adapter(other, tmp_path/'e')

def test_untie():
    model = untie(tied())
    assert torch.equal(logits(model), logits(tied())) and not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    with pytest.raises(ValueError, match='nothing to untie'): untie(model)

# --- convolutions ------------------------------------------------------------------------------------------------------

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1,self.c2 = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 8, (3, 2), stride=2, bias=False)
        self.bn,self.head = nn.BatchNorm2d(8),nn.Linear(8, 4)
    def forward(self, x): return self.head(self.bn(self.c2(self.c1(x).relu())).mean((2, 3)))

def net():
    torch.manual_seed(0)
    return Net().eval()

PIC = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(5))
CONV = {'plain': ({}, {}), 'dora': (dict(dora=True), dict(use_dora=True)), 'rslora': (dict(scaling='rslora'), dict(use_rslora=True)),
        'bn and head': (dict(modules_to_save=['bn', 'head']), dict(modules_to_save=['bn', 'head'])), 'bias': (dict(bias='lora_only'), dict(bias='lora_only'))}

def their_net(way):
    torch.manual_seed(1)
    return get_peft_model(net(), LoraConfig(r=3, lora_alpha=6, target_modules=['c1', 'c2'], **CONV[way][1])).eval()

@pytest.mark.parametrize('way', CONV)
def test_conv2d_equals_pefts(way, tmp_path):
    run = lambda m: m(PIC).detach()
    a = add_lora(net(), r=3, alpha=6, targets=['c1', 'c2'], **CONV[way][0])
    assert torch.equal(run(a.model), run(net()))
    shake(a.parameters())
    a.save(tmp_path/'a')
    close(run(a.model), run(PeftModel.from_pretrained(net(), tmp_path/'a').eval()))
    peer = their_net(way)
    shake(trained(peer)); peer.save_pretrained(tmp_path/'b')
    assert {k: v.shape for k,v in load_file(tmp_path/'b'/'adapter_model.safetensors').items()} == {k: v.shape for k,v in load_file(tmp_path/'a'/'adapter_model.safetensors').items()}
    b = load_adapter(net(), tmp_path/'b')
    close(run(b.model), run(peer))
    assert torch.equal(run(load_adapter(net(), tmp_path/'a').model), run(a.model))

@pytest.mark.parametrize('way', CONV)
def test_conv2d_trains_as_pefts(way):
    peer,a = their_net(way).train(),add_lora(net(), r=3, alpha=6, targets=['c1', 'c2'], **CONV[way][0])
    start = peft.get_peft_model_state_dict(peer)
    with torch.no_grad():
        for k,p in (*a.named_parameters(), *a.own_tensors()): p.copy_(start[k].reshape(p.shape))
    losses = []
    for m,params in ((a.model.train(), list(a.parameters())), (peer, trained(peer))):
        opt,ls = torch.optim.AdamW(params, lr=1e-3),[]
        for _ in range(10):
            loss = torch.nn.functional.cross_entropy(m(PIC), torch.arange(6) % 4)
            ls.append(loss.item()); loss.backward(); opt.step(); opt.zero_grad()
        losses.append(torch.tensor(ls))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    if way=='bn and head':
        mine = a.own['bn'].own['default']
        torch.testing.assert_close(mine.running_mean, peer.base_model.model.bn.modules_to_save['default'].running_mean)
        assert mine.num_batches_tracked == 10 and not a.own['bn'].bare().num_batches_tracked

def test_conv2d_truncates_and_refuses():
    a = add_lora(net(), r=3, targets=['c1', 'c2'], init='pissa')
    shake(a.parameters())
    want = a.model(PIC).detach()
    truncate(a, 6); close(a.model(PIC).detach(), want, 1e-5)
    for conv,text in ((nn.Conv2d(4, 4, 3, groups=2), 'groups=2'), (nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), 'reflect')):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), conv)
        with pytest.raises(ValueError, match=text): add_lora(model, r=2, targets=['0', '1'])
        assert type(model[0]) is type(model[1]) is nn.Conv2d and not adapters(model)

# --- LoftQ -------------------------------------------------------------------------------------------------------------

def test_loftq_is_the_best_of_rank_r_of_the_error():
    from peft.utils.loftq_utils import _low_rank_decomposition
    model,full = llama_4bit(),llama()
    a = add_lora(model, r=8, alpha=24)
    table = loftq(a, full)
    for p,l in a.layers.items():
        W,Q = base_modules(full)[p].weight.detach(),l.weight_2d()
        d = _low_rank_decomposition(W - Q, 8)
        torch.testing.assert_close(l.delta(), d['L'] @ d['R'], rtol=1e-4, atol=1e-6)
        assert abs(table.after[p] - ((W - Q - l.delta()).norm()/W.norm()).item()) < 1e-6
        tail = torch.linalg.svdvals(W - Q)[8:].norm()/W.norm()
        assert abs(table.after[p] - tail.item()) < 1e-5 and table.after[p] < table.before[p]
        torch.testing.assert_close(l.A['default'].norm(dim=1), l.B['default'].norm(dim=0), rtol=1e-3, atol=1e-6)
    with a.disabled(): assert torch.equal(logits(model), logits(llama_4bit()))
    off = lambda m: (logits(m) - logits(full)).norm().item()
    assert off(model) < off(llama_4bit())

def test_loftq_file_fits_any_copy_of_the_base(tmp_path):
    a = add_lora(llama_4bit(), r=8, targets='attention')
    loftq(a, {f'{p}.weight': (lambda w=m.weight: w) for p,m in base_modules(llama()).items() if isinstance(m, nn.Linear)})
    a.save(tmp_path/'a')
    close(logits(a.model), logits(PeftModel.from_pretrained(llama_bnb(), tmp_path/'a')))
    assert torch.equal(logits(load_adapter(llama_4bit(), tmp_path/'a').model), logits(a.model))

@pytest.mark.parametrize('dora', [False, True])
def test_loftq_turns_change_the_base_and_say_so(dora, tmp_path):
    one,more = [],[]
    for out,turns in ((one, 1), (more, 4)):
        a = add_lora(llama_4bit(), r=8, targets='attention', dora=dora)
        out += [a, loftq(a, llama(), turns)]
    assert (more[1].after < one[1].after).all() and one[1].before.equals(more[1].before)
    a,table = more
    for p,l in a.layers.items():
        W = base_modules(llama())[p].weight
        assert abs(table.after[p] - ((W - l.merged('default')).norm()/W.norm()).item()) < 1e-5
    with pytest.warns(UserWarning, match='fits no other'): a.save(tmp_path/'a')
    with pytest.raises(AdapterMismatch, match='loftq chose'): load_adapter(llama_4bit(), tmp_path/'a')
    again = llama_4bit()
    b = add_lora(again, r=8, targets='attention'); loftq(b, llama(), 4); b.remove()
    assert torch.equal(logits(load_adapter(again, tmp_path/'a').model), logits(a.model)) and adapters(again)['default'].changed_base
    other = add_lora(again, r=2, targets='q_proj', name='other')   # a later adapter on such a base fits no other one either
    with pytest.warns(UserWarning, match='fits no other'): other.save(tmp_path/'b')
    with pytest.raises(AdapterMismatch, match='loftq chose'): load_adapter(llama_4bit(), tmp_path/'b')
    assert not one[0].changed_base and copy.deepcopy(again).__dict__['_lora_nb_changed_base']

def test_loftq_errors_change_nothing():
    model = llama_4bit()
    a = add_lora(model, r=2, targets='attention')
    want = logits(model)
    for source,kw,error,text in ((llama_4bit(), {}, ValueError, 'itself in 4 bits'), (llama(hidden_size=32), {}, ValueError, 'has shape'), ({}, {}, KeyError, 'has no tensor'),
                                 (llama(), dict(iterations=0), ValueError, 'at least 1')):
        with pytest.raises(error, match=text): loftq(a, source, **kw)
    add_lora(model, r=2, targets='q_proj', name='b')
    with pytest.raises(ValueError, match='under the other adapters'): loftq(a, llama(), 2)
    adapters(model)['b'].remove(); activate(model, 'default')
    assert torch.equal(logits(model), want) and not a.changed_base
    with pytest.raises(ValueError, match='No layer of this adapter'): loftq(add_lora(llama(), r=2), llama())
    with pytest.raises(ValueError, match='Use iterations=1'): loftq(add_lora(llama_bnb(), r=2), llama(), 2)
    loftq(a, llama())
    with pytest.raises(ValueError, match='past its start'): loftq(a, llama())
