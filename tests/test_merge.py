"Merging: what is reported is what a fresh process reads from the folder; unmerge bit for bit; nothing half written."
import json, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import pandas as pd, pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from lora_nb import merge as M
import tempfile
from lora_nb.adapter import activate, add_lora, by_row, extract, load_adapter, loftq
from lora_nb.data import Sample
from lora_nb.linear4bit import Linear4bit
from lora_nb.merge import chosen, merge, merge_in_place, merge_report, merged, merged_parts, recommend, unmerge
from lora_nb.quantize import INT4, NF4

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=.1)

@pytest.fixture(autouse=True, scope='module')
def one_core():
    "Matrices this small are faster on one core."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def llama(seed=0, **kw):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, 'tie_word_embeddings': False, **kw})).eval()

def gpt2(**kw):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=32, initializer_range=.1, **kw)).eval()

def in_4bit(model, quant=NF4(double=True)):
    for p,l in [(p, l) for p,l in model.named_modules() if isinstance(l, nn.Linear) and p!='lm_head']: model.set_submodule(p, Linear4bit.from_linear(l, quant, p))
    return model

def shaken(adapter, std=.05, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters(): p += std*torch.randn(p.shape, generator=g)
    return adapter

def samples(n=8, length=12, vocab=96):
    g = torch.Generator().manual_seed(0)
    def one(i):
        ids = torch.randint(vocab, (length - i%3,), generator=g).tolist()
        return Sample(ids, [-100]*3+ids[3:], i)
    return [one(i) for i in range(n)]

ROWS = samples()
DATA = SimpleNamespace(train=[], val=ROWS, tok=SimpleNamespace(pad_token_id=0))
X = torch.arange(40).view(2, 20) % 96

@torch.no_grad()
def answers(model): return torch.cat([model(torch.tensor([s.input_ids])).logits[0, 2:-1] for s in ROWS])

FRESH = '''
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids, folders = json.loads(open(sys.argv[1]).read())
for f in folders:
    model, info = AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32, output_loading_info=True)
    wrong = {k: sorted(map(str, v)) for k,v in info.items() if v}
    for m in model.modules(): m.training = type(m).__name__=='Linear4bit'    # in eval mode bitsandbytes multiplies in bf16 where the CPU can
    with torch.no_grad(): save_file({'logits': torch.cat([model(torch.tensor([i])).logits[0, 2:-1] for i in ids])}, f + '.out')
    print(json.dumps([f, wrong, type(model.model.layers[0].self_attn.q_proj).__name__ if hasattr(model, 'model') else '', next(model.parameters()).shape[0]]))
assert 'lora_nb' not in sys.modules
'''

def fresh(tmp_path, folders):
    "Logits of each folder at the labelled positions, by transformers alone in another process."
    (tmp_path/'fresh.py').write_text(FRESH)
    (tmp_path/'in.json').write_text(json.dumps([[s.input_ids for s in ROWS], list(map(str, folders))]))
    out = subprocess.run([sys.executable, str(tmp_path/'fresh.py'), str(tmp_path/'in.json')], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode==0, out.stderr[-3000:]
    said = [json.loads(l) for l in out.stdout.splitlines() if l.startswith('[')]
    assert not any(wrong for _,wrong,*_ in said), said
    return {f: load_file(f'{f}.out')['logits'] for f in folders}, {f: kind for f,_,kind,_ in said}

LABELS = torch.tensor([l for s in ROWS for l in s.labels[3:]])

def figures(a, b):
    a,b = a.double(),b.double()
    p,q = a.log_softmax(-1),b.log_softmax(-1)
    return dict(logits=((a-b).norm()/a.norm()).item(), kl=(p.exp()*(p-q)).sum(-1).mean().item(), loss=-q.gather(1, LABELS[:,None]).mean().item(), changed=(a.argmax(-1)!=b.argmax(-1)).double().mean().item())


def several(model):
    shaken(add_lora(model, r=4, targets=['q_proj', 'down_proj']))
    shaken(add_lora(model, r=2, targets=['q_proj', 'v_proj'], dora=True, name='two'), seed=2)
    activate(model, 'default', 'two')
    return model

def on(model, **kw): shaken(add_lora(model, r=4, **kw)); return model

def on_embedding(make, **kw):
    "An adapter file that was made on a free embedding, loaded on a tied one."
    free = make(tie_word_embeddings=False)
    with tempfile.TemporaryDirectory() as d:
        shaken(add_lora(free, r=4, **kw)).save(d)
        model = make(tie_word_embeddings=True)
        with pytest.warns(UserWarning, match='tied'): load_adapter(model, d)
    return model

CASES = dict(dense=lambda: on(llama()), tied=lambda: on(llama(tie_word_embeddings=True)),
    tied_embedding=lambda: on_embedding(llama, targets=['embed_tokens', 'q_proj']),
    dora=lambda: on(llama(), dora=True), dora_4bit=lambda: on(in_4bit(llama()), dora=True), biases=lambda: on(in_4bit(llama(attention_bias=True))),
    pissa=lambda: on(llama(), init='pissa'), rslora=lambda: on(llama(), scaling='rslora'), several=lambda: several(llama()), several_4bit=lambda: several(in_4bit(llama())),
    embedding_dora=lambda: on(llama(), targets=['embed_tokens', 'q_proj'], dora=True), head=lambda: on(llama(), targets=['lm_head', 'v_proj']), gpt2=lambda: on(gpt2()), gpt2_embedding=lambda: on_embedding(gpt2, targets=['wte', 'c_attn']),
    bias=lambda: on(gpt2(), bias='all'), bias_4bit=lambda: on(in_4bit(llama(attention_bias=True)), bias='lora_only', dora=True),
    whole=lambda: on(in_4bit(llama()), modules_to_save=['lm_head', 'norm']), rows=lambda: on(llama(), trainable_token_indices=[3, 5, 40]),
    rows_tied=lambda: on(in_4bit(llama(tie_word_embeddings=True)), trainable_token_indices=[3, 5, 40]),
    experts=lambda: on(MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES)).eval(), targets='attention'))

@pytest.fixture(scope='module')
def reloaded(tmp_path_factory):
    "All merged folders, and what one fresh process makes of them."
    at = tmp_path_factory.mktemp('merged')
    original,model = llama(),in_4bit(llama())
    original.save_pretrained(at/'original')
    a = shaken(add_lora(model, r=4))
    report = merge_report(model, a, DATA, original=at/'original', batch_size=3)
    with a.disabled(): without = answers(model)
    kinds,tables = {'fp32': torch.float32, 'bf16': torch.bfloat16, '4bit': '4bit'},{}
    for way,r in report.iterrows(): tables[way] = merge(model, a, at/way, into='base' if r['into']=='base' else at/'original', dtype=kinds[r['dtype']])
    models = {k: make() for k,make in CASES.items()}
    want = {k: answers(m) for k,m in models.items()}
    for k,m in models.items(): merge(m, None, at/k, dtype=torch.float32, shard_bytes=40_000)
    back,layer = fresh(at, [at/k for k in (*report.index, *models)])
    return SimpleNamespace(report=report, unmerged=answers(model), without=without, tables=tables, want=want, at=at,
                           back={f.name: t for f,t in back.items()}, layer={Path(f).name: k for f,k in layer.items()})

def test_the_report_foretells_what_a_fresh_process_reads(reloaded):
    report,unmerged = reloaded.report,reloaded.unmerged
    assert set(report.index)=={f'{i}, {d}' for i in ('base', 'original') for d in ('fp32', 'bf16', '4bit')}
    for way,table in reloaded.tables.items():
        packed,got = way.endswith('4bit'),figures(unmerged, reloaded.back[way])
        assert table.read_back.all() and (packed or table.bytes.sum()==report.loc[way, 'bytes'])
        for k in ('logits', 'kl', 'loss', 'changed'): assert report.loc[way, k]==pytest.approx(got[k], rel=2e-4, abs=2e-6), (way, k)
        assert reloaded.layer[way]==('Linear4bit' if packed else 'Linear')
        assert ('quantization_config' in json.loads((reloaded.at/way/'config.json').read_text()))==packed
    assert report.loc['base, fp32', 'kl'] < 1e-10 and report.loc['base, bf16', 'kl'] < report.loc['base, 4bit', 'kl']/50
    assert report.kl.is_monotonic_increasing and report.attrs['unmerged']==pytest.approx(figures(unmerged, unmerged)['loss'], rel=1e-6)
    assert report.attrs['without']==pytest.approx(figures(unmerged, reloaded.without)['loss'], rel=1e-6)

def test_every_kind_of_layer_and_adapter_merges_and_is_reloaded(reloaded):
    for k,want in reloaded.want.items(): assert ((reloaded.back[k]-want).norm()/want.norm()).item() < 2e-5, k
    tied = lambda k: json.loads((reloaded.at/k/'config.json').read_text())['tie_word_embeddings']
    assert tied('tied') and tied('rows_tied') and not tied('tied_embedding') and not tied('gpt2_embedding')


@pytest.mark.parametrize('case', [*CASES])
def test_merging_in_place_restores_the_model_bit_for_bit(case):
    model = CASES[case]()
    state,before,modules = {k: v.clone() for k,v in model.state_dict().items()},answers(model),dict(model.named_modules())
    with merged(model) as m:
        assert ((answers(m)-before).norm()/before.norm()).item() < 2e-5
        assert not any(hasattr(x, 'active') for x in m.modules())
    assert torch.equal(answers(model), before) and {p: id(m) for p,m in model.named_modules()}=={p: id(m) for p,m in modules.items()}
    assert all(torch.equal(state[k], v) for k,v in model.state_dict().items())


@pytest.mark.parametrize('case', ['dora_4bit', 'tied_embedding', 'gpt2_embedding', 'head', 'experts', 'bias_4bit', 'whole', 'rows', 'rows_tied'])
def test_a_report_leaves_the_model_as_it_was(case):
    model = CASES[case]()
    state,before,ids = {k: v.clone() for k,v in model.state_dict().items()},answers(model),{p: id(m) for p,m in model.named_modules()}
    model.train()
    report = merge_report(model, None, DATA, quant=NF4())
    assert model.training and report.loc['base, fp32', 'kl'] < 1e-9 and report.loc['base, fp32', 'logits'] < 1e-5
    model.eval()
    assert torch.equal(answers(model), before) and {p: id(m) for p,m in model.named_modules()}==ids
    assert all(torch.equal(state[k], v) for k,v in model.state_dict().items())


def test_a_failure_while_measuring_restores_the_model(monkeypatch):
    model = CASES['dora_4bit']()
    before = answers(model)
    def broken(*a, **k): raise RuntimeError('stop')
    monkeypatch.setattr(M, '_compare', broken)
    with pytest.raises(RuntimeError, match='stop'): merge_report(model, None, DATA)
    assert torch.equal(answers(model), before)


def test_weights_equal_those_of_peft(tmp_path):
    peft = pytest.importorskip('peft')
    model = CASES['dora']()
    from lora_nb.adapter import adapters
    adapters(model)['default'].save(tmp_path/'adapter')
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path/'adapter').merge_and_unload().state_dict()
    merge(model, 'default', tmp_path/'out', dtype=torch.float32)
    ours = load_file(tmp_path/'out/model.safetensors')
    assert set(ours)==set(theirs)
    for k in ours: assert torch.allclose(ours[k], theirs[k], atol=1e-5), k


def test_a_base_in_bitsandbytes_own_layers(tmp_path):
    bnb = pytest.importorskip('bitsandbytes')
    model = llama()
    for p,l in [(p, l) for p,l in model.named_modules() if isinstance(l, nn.Linear) and p!='lm_head']:
        new = bnb.nn.Linear4bit(l.in_features, l.out_features, bias=False, compute_dtype=torch.float32, quant_type='nf4', compress_statistics=False)
        new.weight = bnb.nn.Params4bit(l.weight.data, requires_grad=False, quant_type='nf4', compress_statistics=False)
        model.set_submodule(p, new)
    model = model.to('cpu')
    a = shaken(add_lora(model, r=4, targets=['q_proj', 'up_proj']))
    report = merge_report(model, a, DATA)
    assert report.loc['base, fp32', 'kl'] < 1e-9 and report.loc['base, 4bit', 'kl'] > 1e-5
    before = answers(model)
    with merged(model, a): assert (answers(model)-before).norm()/before.norm() < 1e-5
    assert torch.equal(answers(model), before)


def test_4_bits_again_touches_adapted_layers_only():
    model = in_4bit(llama())
    a = shaken(add_lora(model, r=4, targets='q_proj'))
    parts = merged_parts(model, ['default'], '4bit')
    q,k = (parts[f'model.layers.0.self_attn.{n}_proj.weight'].make() for n in 'qk')
    base = model.model.layers[0].self_attn
    assert torch.equal(k.packed, base.k_proj.weight) and torch.equal(k.absmax, base.k_proj.absmax)
    assert not torch.equal(q.packed, base.q_proj.base.weight)


def test_shards_are_bounded_and_indexed(tmp_path):
    model = CASES['dense']()
    table = merge(model, None, tmp_path/'out', dtype=torch.bfloat16, shard_bytes=30_000)
    index = json.loads((tmp_path/'out/model.safetensors.index.json').read_text())
    assert len(table)>3 and (table.bytes<=30_000).all() and index['metadata']['total_size']==table.bytes.sum()
    held = {}
    for f in table.index:
        with safe_open(tmp_path/'out'/f, 'pt') as o: held |= {k: f for k in o.keys()}
    assert held==index['weight_map'] and len(held)==table.tensors.sum()


def test_the_adapters_that_are_named_are_merged_whatever_is_active():
    model = several(llama())
    activate(model, 'two')
    alone = merged_parts(model, ['default'], torch.float32)['model.layers.0.self_attn.q_proj.weight'].make()
    layer = model.model.layers[0].self_attn.q_proj
    assert torch.allclose(alone, layer.base.weight + layer.delta('default'), atol=1e-6)
    assert model.model.layers[0].self_attn.q_proj.active==['two']
    report = merge_report(model, 'default', DATA, dtypes=[torch.float32])
    assert report.loc['base, fp32', 'kl'] < 1e-9 and layer.active==['two']


def test_a_damaged_write_is_found_and_nothing_is_left(tmp_path, monkeypatch):
    model,real = CASES['dense'](),M.save_file
    def bad(tensors, file, **kw):
        real(tensors, file, **kw)
        raw = bytearray(open(file, 'rb').read()); raw[-3] ^= 1
        open(file, 'wb').write(raw)
    monkeypatch.setattr(M, 'save_file', bad)
    with pytest.raises(OSError, match='reads back otherwise'): merge(model, None, tmp_path/'out')
    assert not list(tmp_path.iterdir())


def test_refusals_say_what_to_do_and_leave_nothing(tmp_path, monkeypatch):
    model = CASES['dense']()
    (tmp_path/'there').mkdir()
    refuse = lambda kind, words, **kw: pytest.raises(kind, merge, model, **{'folder': tmp_path/'out', **kw}).match(words)
    refuse(FileExistsError, 'exists already', folder=tmp_path/'there')
    refuse(KeyError, 'it has: default', adapter='nobody')
    refuse(ValueError, 'expected torch.float32', dtype=torch.int8)
    refuse(ValueError, 'say how', dtype='4bit')
    refuse(ValueError, 'NF4 and FP4', dtype='4bit', quant=INT4())
    refuse(ValueError, 'has shape', into=llama(hidden_size=32))
    refuse(ValueError, 'itself in 4 bits', into=in_4bit(llama()))
    refuse(FileNotFoundError, 'not there', into=str(tmp_path/'nowhere'))
    with torch.no_grad(): model.model.layers[0].self_attn.q_proj.B['default'].mul_(1e8)
    refuse(ValueError, 'fp16 ends at 65504', dtype=torch.float16)
    model = CASES['dense']()
    activate(model)
    refuse(ValueError, 'No adapter is active')
    with by_row(model, ['default']): refuse(ValueError, 'by_row', adapter='default')
    layer = model.model.layers[0].self_attn.q_proj
    odd = lambda layer, name, x, y: y + layer.update(name, x).relu()
    layer.how['default'] = odd
    refuse(ValueError, 'not a change of W alone', adapter='default')
    monkeypatch.setattr(M.shutil, 'disk_usage', lambda p: SimpleNamespace(free=10))
    model = CASES['dense']()
    refuse(OSError, 'free')
    assert [p.name for p in tmp_path.iterdir()]==['there']


def test_a_base_that_loftq_changed_merges_into_itself_only(tmp_path):
    model,original = in_4bit(llama()),llama()
    a = add_lora(model, r=4)
    loftq(a, original, 3)
    shaken(a, .02)
    for call in (lambda: merge(model, a, tmp_path/'out', into=original), lambda: merge_report(model, a, DATA, original=original)):
        with pytest.raises(ValueError, match='loftq with iterations > 1.*count twice.*Merge into the base'): call()
    assert not list(tmp_path.iterdir())
    assert merge_report(model, a, DATA).loc['base, fp32', 'kl'] < 1e-9
    # one turn leaves the base alone, and the report shows what the original does to it
    model = in_4bit(llama())
    a = add_lora(model, r=4)
    loftq(a, original)
    shaken(a, .02)
    report = merge_report(model, a, DATA, original=original)
    assert report.loc['original, fp32', 'kl'] > 100*report.loc['base, fp32', 'kl'] and chosen(report).startswith('base')


def test_a_layer_that_does_more_than_one_matrix_is_found_by_its_probe(tmp_path):
    model = CASES['dense']()
    layer = model.model.layers[1].mlp.up_proj
    plain = layer.update
    layer.update = lambda name, x: plain(name, x).relu()
    with pytest.raises(ValueError, match='up_proj.*do not act as one matrix'): merge(model, None, tmp_path/'out')
    assert not list(tmp_path.iterdir())


def test_in_place_refusals():
    model = CASES['dense']()
    with pytest.raises(ValueError, match='not merged'): unmerge(model)
    merge_in_place(model)
    with pytest.raises(ValueError, match='merged already'): merge_in_place(model)
    unmerge(model)


def test_no_held_out_samples(): pytest.raises(ValueError, merge_report, CASES['dense'](), None, []).match('held-out')


def made_up(rows, unmerged=2., without=3.):
    report = pd.DataFrame([dict(into=i, dtype=d, logits=.1, kl=kl, loss=2+delta, delta=delta, error=.01, changed=.1, bytes=b) for i,d,kl,delta,b in rows], index=[f'{r[0]}, {r[1]}' for r in rows]).sort_values('kl')
    report.attrs.update(unmerged=unmerged, without=without, tokens=100, samples=10, adapters=['default'], compute='fp32')
    return report

def test_the_recommendation_follows_the_numbers():
    good = made_up([('base', 'fp32', 1e-9, 0., 400), ('base', 'bf16', 1e-5, .001, 200), ('base', '4bit', .5, .7, 60)])
    assert chosen(good)=='base, bf16' and 'undoing 70 % of what the adapter gained' in recommend(good) and 'Recommended: merge into the base that it was trained on, kept in bf16' in recommend(good)
    bad = made_up([('base', '4bit', .5, .7, 60), ('original', 'bf16', .2, -.1, 200)])
    assert chosen(bad) is None and 'keep the adapter beside its base' in recommend(bad) and 'does better on these samples' in recommend(bad)


def test_extracting_from_a_merged_folder(tmp_path):
    model = CASES['dense']()
    want = answers(model)
    merge(model, None, tmp_path/'out', dtype=torch.float32)
    tuned = load_model_only(tmp_path/'out')
    for rank in (4, 64):
        base = llama()
        extract(base, tuned, rank=rank)
        assert (answers(base)-want).norm()/want.norm() < 1e-5
    base = llama()
    path = 'model.layers.0.mlp.up_proj'
    D = tuned.get_submodule(path).weight-base.get_submodule(path).weight
    S = torch.linalg.svdvals(D.detach().double())
    a,table = extract(base, tuned, rank=2)
    got = (D.double()-a.layers[path].delta(a.name).double()).norm().item()
    assert got==pytest.approx(S[2:].square().sum().sqrt().item(), rel=1e-4) and table.loc[path, 'left out']==pytest.approx(got/D.norm().item(), rel=1e-3)

def load_model_only(folder): return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
