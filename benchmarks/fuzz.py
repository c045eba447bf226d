"""What bad bytes do to the readers: files that the package wrote, damaged at random and read again.

    python benchmarks/fuzz.py [--inputs 120000] [--reader NAME] [--seed 0] [--only N] [--atheris SECONDS]

Each input is made from (reader, seed, number) alone, so that a line of the report can be repeated with `--reader NAME --only N`.
An input must be accepted, or refused with the reader's own error, raised in lora_nb, within 5 seconds and 500 MB; it must leave the
folder as it was and, where it is refused, the model too. The readers run in a child process that is watched: one that dies or hangs
is counted, and a new one goes on with the next input. `--atheris` lets libFuzzer choose the bytes, guided by coverage (pip install atheris).
"""
import argparse, copy, csv, importlib.util, io, json, os, random, resource, shutil, struct, subprocess, sys, tempfile, time, traceback, warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(importlib.util.find_spec('lora_nb').origin).parent
SECONDS, BYTES = 5, 500*2**20
SHARES = dict(jsonl=.25, csv=.12, text=.03, gguf=.22, codes=.14, events=.05, adapter=.08, inspector=.02, checkpoint=.02, folder=.04, four_bit=.01, gguf_model=.01, template=.01)

# --- damage ---------------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 2, 3, 7, 8, 31, 64, 127, 255, 256, 1000, 65535, 2**31-1, 2**31, 2**32-1, 2**32, 2**53, 2**62, 2**63-1, 2**63, 2**64-1, 10**30, -2**63, .5, -0., 1e308, 1e-320, float('nan'), float('inf')]
WORDS = ['', ' ', 'a', '\x00', '\ud800', '\u2028', '\ufeff', '𝒳', 'é'*50, '../x', '/etc/passwd', '{{', '%s', '(', '(a+)+$', '(.*.*)*x', 'x'*1000, 'lora', 'float32', 'F32', 'none', 'NaN', '-1', '0']


def value(rng, deep=2):
    "Any JSON value."
    pick = rng.random()
    if pick<.3: return rng.choice(NUMBERS)
    if pick<.6: return rng.choice(WORDS)
    if pick<.75 or not deep: return rng.choice([None, True, False, [], {}])
    if pick<.9: return [value(rng, deep-1) for _ in range(rng.randrange(4))]
    return {rng.choice(WORDS): value(rng, deep-1) for _ in range(rng.randrange(4))}


def places(x, at=()):
    "The path of each value inside of x."
    yield at
    for k in (x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ()): yield from places(x[k], (*at, k))


def damage_json(x, rng):
    "x with one to three values changed, left out, renamed, copied or nested."
    x = copy.deepcopy(x)
    for _ in range(rng.randint(1, 3)):
        *path,last = rng.choice([p for p in places(x) if p] or [(None,)])
        if last is None: return value(rng)
        parent = x
        for k in path: parent = parent[k]
        how = rng.randrange(6)
        if how==0: del parent[last]
        elif how==1 and isinstance(parent, dict): parent[rng.choice([*WORDS, *map(str, parent)])] = parent.pop(last)
        elif how==2 and isinstance(parent, list): parent.append(copy.deepcopy(parent[last]))
        elif how==3: parent[last] = [parent[last]]
        elif how==4 and isinstance(parent[last], str): parent[last] = damage_text(parent[last], rng)
        else: parent[last] = value(rng)
    return x


def dumps(x):
    try: return json.dumps(x).encode('utf-8')
    except ValueError: return repr(x).encode('utf-8', 'replace')


def damage_text(text, rng):
    i = rng.randrange(len(text)+1)
    return rng.choice([text[:i], text[:i]+rng.choice(WORDS)+text[i:], text[i:]+text[:i], text*2, text[:i]+text[i+1:], text.swapcase()])


def damage(b, rng):
    "b with one to four pieces flipped, cut, doubled, put in, zeroed or written over with numbers."
    b = bytearray(b)
    for _ in range(rng.randint(1, 4)):
        i,n = rng.randrange(len(b)+1),rng.choice([1, 1, 2, 4, 8, 32, 200])
        how = rng.randrange(8)
        if how==0 and i<len(b): b[i] ^= 1<<rng.randrange(8)
        elif how==1: del b[i:i+n]
        elif how==2: b[i:i] = b[i:i+n]*rng.choice([1, 2, 50])
        elif how==3: b[i:i] = rng.randbytes(n)
        elif how==4: b[i:i+n] = bytes(len(b[i:i+n]))
        elif how==5: del b[i:]
        elif how==6:
            whole = rng.choice([o for o in NUMBERS if isinstance(o, int)])
            size = rng.choice([1, 2, 4, 8])
            b[i:i+size] = (whole % 2**(8*size)).to_bytes(size, 'little')
        else: b[i:i+n] = rng.choice(WORDS).encode('utf-8', 'replace')
    return bytes(b)


def damage_safetensors(b, rng):
    "Half the time the bytes, else the header's JSON with its length put right."
    if rng.random()<.35: return damage(b, rng)
    if rng.random()<.1: return struct.pack('<Q', abs(int(rng.choice(NUMBERS[:24]))) % 2**64)+b[8:]
    n = struct.unpack('<Q', b[:8])[0]
    head = damage_json(json.loads(b[8:8+n]), rng)
    if rng.random()<.1: head = {f't{i}': dict(dtype='F32', shape=[], data_offsets=[0, 4]) for i in range(rng.choice([1, 1000]))}
    raw = dumps(head)
    return struct.pack('<Q', len(raw))+raw+b[8+n:]

# --- GGUF -----------------------------------------------------------------------------------------------------------------

KINDS = dict(enumerate('BbHhIif?'))|{10:'Q', 11:'q', 12:'d'}


def text_bytes(s):
    s = s.encode('utf-8', 'replace')
    return struct.pack('<Q', len(s))+s


def gguf_value(kind, v):
    if kind==8: return text_bytes(v)
    if kind==9: return struct.pack('<IQ', v[0], len(v[1]))+b''.join(gguf_value(v[0], o) for o in v[1])
    return struct.pack('<'+KINDS[kind], v)


def gguf_bytes(meta, tensors, data, version=3, counts=None):
    "meta: (key, kind, value); tensors: (name, shape, kind, offset). Numbers that do not fit are cut to their bits."
    out = struct.pack('<4sIQQ', b'GGUF', version, *(counts or (len(tensors), len(meta))))
    for k,kind,v in meta: out += text_bytes(k)+struct.pack('<I', kind)+gguf_value(kind, v)
    for name,shape,kind,at in tensors:
        out += text_bytes(name)+struct.pack('<I', len(shape))+b''.join(struct.pack('<Q', n % 2**64) for n in shape)+struct.pack('<IQ', kind % 2**32, at % 2**64)
    return out+bytes(-len(out) % 32)+data


def gguf_parts():
    "A small llama, as `gguf_bytes` takes it."
    import numpy as np
    h,ff,vocab,heads = 32,48,40,4
    key = lambda k: f'llama.{k}'
    meta = [('general.architecture', 8, 'llama'), ('general.alignment', 4, 32), (key('block_count'), 4, 1), (key('context_length'), 4, 64), (key('embedding_length'), 4, h), (key('feed_forward_length'), 4, ff),
            (key('attention.head_count'), 4, heads), (key('attention.head_count_kv'), 4, 2), (key('attention.layer_norm_rms_epsilon'), 6, 1e-5), (key('rope.freq_base'), 6, 1e4), (key('rope.dimension_count'), 4, h//heads),
            (key('vocab_size'), 4, vocab), ('tokenizer.ggml.model', 8, 'gpt2'), ('tokenizer.ggml.tokens', 9, (8, ['<unk>', '<s>', '</s>', 'w', '1', 'w1']+[f'w{i}' for i in range(6, vocab)])),
            ('tokenizer.ggml.token_type', 9, (5, [3]*3+[1]*(vocab-3))), ('tokenizer.ggml.merges', 9, (8, ['w 1'])), ('tokenizer.ggml.bos_token_id', 4, 1), ('tokenizer.ggml.eos_token_id', 4, 2)]
    shapes = {'token_embd.weight': (vocab, h), 'output_norm.weight': (h,), 'output.weight': (vocab, h)} | {f'blk.0.{k}.weight': s for k,s in dict(
        attn_norm=(h,), ffn_norm=(h,), attn_q=(h, h), attn_k=(h//2, h), attn_v=(h//2, h), attn_output=(h, h), ffn_gate=(ff, h), ffn_up=(ff, h), ffn_down=(h, ff)).items()}
    tensors,data,rng = [],b'',np.random.default_rng(0)
    for name,shape in shapes.items():
        tensors.append((name, shape[::-1], 0, len(data)))
        data += rng.normal(size=shape).astype(np.float32).tobytes()
    return meta,tensors,data


def damage_gguf(parts, rng):
    meta,tensors,data = parts
    meta,tensors,counts,version = list(meta),list(tensors),None,3
    for _ in range(rng.randint(1, 3)):
        how = rng.randrange(8)
        if how==0: counts = [rng.choice([len(x), 0, 1, 2**31, 2**63, 2**64-1]) for x in (tensors, meta)]
        elif how in (1, 2) and meta:
            i = rng.randrange(len(meta))
            k,kind,v = meta[i]
            whole = abs(int(rng.choice(NUMBERS[:22])))
            meta[i] = rng.choice([(k, 4, whole % 2**32), (k, 10, whole % 2**64), (k, 11, -(whole % 2**63)), (k, 6, rng.choice([0., -1., 3e38, float('nan')])), (k, 8, rng.choice(WORDS)), (k, 7, True), (k, 9, (4, [1, 2])), (k, 9, (8, ['a']*3)), (k, 9, (9, [(4, [])]*5)), (rng.choice(WORDS), kind, v)])
        elif how==3 and meta: del meta[rng.randrange(len(meta))]
        elif how==4 and meta: meta.append(rng.choice(meta))
        elif how in (5, 6) and tensors:
            i = rng.randrange(len(tensors))
            name,shape,kind,at = tensors[i]
            whole = abs(int(rng.choice(NUMBERS[:24])))
            tensors[i] = rng.choice([(name, (whole, *shape[1:]), kind, at), (name, (*shape, whole), kind, at), (name, (), kind, at), (name, shape, rng.choice([1, 2, 3, 8, 10, 30, 31, 99, 2**31]), at), (name, shape, kind, whole), (rng.choice(WORDS), shape, kind, at), (tensors[0][0], shape, kind, at)])
        else: version = rng.choice([1, 2, 3, 4, 2**31])
    raw = gguf_bytes(meta, tensors, data, version, counts)
    return damage(raw, rng) if rng.random()<.3 else raw


def nested_gguf(depth): return struct.pack('<4sIQQ', b'GGUF', 3, 0, 1)+text_bytes('k')+struct.pack('<I', 9)+struct.pack('<IQ', 9, 1)*depth

# --- readers --------------------------------------------------------------------------------------------------------------

class Reader:
    "`make(rng)` writes an input to `self.folder`; `read()` reads it. `own`: the errors that say no."
    own = ValueError,FileNotFoundError
    def __init__(self, folder):
        self.folder = folder
        self.good()
    def good(self): pass
    def unchanged(self): return True


def tiny_model(**kw):
    import torch
    from transformers import LlamaConfig,LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)|kw)).eval()


def tiny_tokenizer():
    from tokenizers import Tokenizer,models,pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({'<unk>':0, '<s>':1, '</s>':2, **{f'w{i}':i for i in range(3, 40)}}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    tok.chat_template = TEMPLATE
    return tok


TEMPLATE = "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<s> assistant : {% endif %}"
ROWS = [dict(messages=[dict(role='system', content='Be brief.'), dict(role='user', content='w3 w4'), dict(role='assistant', content='w5 w6')]), dict(prompt='w3', completion='w4', split='train'),
        dict(instruction='w3', input='w4', output='w5'), dict(conversations=[{'from':'human', 'value':'w3'}, {'from':'gpt', 'value':'w4'}]), dict(text='w3 w4 w5')]


class Rows(Reader):
    "JSONL, CSV and text through `chat_data`."
    def good(self):
        from lora_nb.data import DataError,chat_data
        self.own,self.chat_data,self.tok = (DataError,),chat_data,tiny_tokenizer()
    def read(self): self.chat_data(self.file, self.tok, max_len=64, val=0)


class Jsonl(Rows):
    def make(self, rng):
        rows = rng.choices(ROWS, k=rng.randint(1, 3))
        if rng.random()<.6: raw = b'\n'.join(dumps(damage_json(r, rng)) for r in rows)
        else: raw = damage(b'\n'.join(map(dumps, rows)), rng)
        if rng.random()<.02: raw = b'{"text": '+rng.choice([b'9'*5000, b'['*3000, b'"\\ud800"', b'1e999', b'-', b'{"a":'*2000])+b'}'
        self.file = self.folder/'rows.jsonl'
        self.file.write_bytes(raw)


class Csv(Rows):
    def make(self, rng):
        out = io.StringIO()
        csv.writer(out).writerows([['prompt', 'completion'], ['w3, w4', 'w5'], ['a "b"', 'c\nd']])
        raw = out.getvalue().encode()
        self.file = self.folder/'rows.csv'
        self.file.write_bytes(damage(raw, rng) if rng.random()<.97 else raw+b'x,'+b'y'*rng.choice([10, 200_000])+b'\n')


class Text(Rows):
    def make(self, rng):
        self.file = self.folder/'rows.txt'
        self.file.write_bytes(damage(b'w3 w4\nw5\n\nw6 w7\n\n\nw8 \xc3\xa9\n', rng))


class Gguf(Reader):
    own = ValueError,
    def good(self): self.parts = gguf_parts()
    def make(self, rng):
        self.file = self.folder/'m.gguf'
        self.file.write_bytes(damage_gguf(self.parts, rng) if rng.random()>.002 else nested_gguf(rng.choice([10, 500, 5000])))
    def read(self):
        from lora_nb.models import gguf_header,read_gguf_tensor
        _,table = gguf_header(self.file)
        for name,(shape,kind,at) in list(table.items())[:3]: read_gguf_tensor(self.file, shape, kind, at)


class GgufModel(Gguf):
    own = ValueError,FileNotFoundError
    def read(self):
        from lora_nb.models import load_model
        load_model(self.file, device='cpu')


class Codes(Reader):
    "`QuantizedTensor.from_state_dict` on parts that were changed."
    own = ValueError,
    def good(self):
        import torch
        from lora_nb.quantize import FP4,INT4,NF4,quantize
        torch.manual_seed(0)
        w = torch.randn(16, 40)
        made = [quantize(w, c) for c in (NF4(), NF4(double=True), FP4(), INT4())]
        for q in made: q.dequantize() # imports bitsandbytes
        self.states = [q.state_dict() for q in made]
    def make(self, rng):
        import torch
        sd = dict(rng.choice(self.states))
        for _ in range(rng.randint(1, 2)):
            k = rng.choice(list(sd))
            t,how = sd[k],rng.randrange(8)
            if how==0: del sd[k]
            elif how==1: sd[k] = t.flatten()[:rng.randrange(t.numel()+1)]
            elif how==2: sd[k] = t.to(rng.choice([torch.float16, torch.int64, torch.bool, torch.float64]))
            elif how==3: sd[k] = t.reshape(1, -1).repeat(rng.randint(1, 3), rng.randint(1, 2))
            elif how==4: sd[k] = torch.full_like(t, rng.choice([0, 1, 3]))
            elif how==5 and t.is_floating_point(): sd[k] = t*float('nan')
            elif 'quant_state' in k:
                facts = bytes(b for b in t.tolist() if isinstance(b, int) and 0<=b<256)
                try: raw = dumps(damage_json(json.loads(facts), rng)) if how==6 else damage(facts, rng)
                except ValueError: raw = b'{'
                sd[k] = torch.tensor(list(raw), dtype=torch.uint8)
            else: sd[rng.choice(['weight.quant_state.x', 'weight.y', 'other'])] = sd.pop(k)
        self.sd = sd
    def read(self):
        from lora_nb.quantize import QuantizedTensor
        QuantizedTensor.from_state_dict(self.sd).dequantize()


class Events(Reader):
    def good(self): self.lines = [dict(kind='state', time=.1, step=0, state='running'), *(dict(kind='step', time=.2*i, step=i, loss=3/i, lr=1e-3, epoch=.1*i, grad_norm=1., tokens=9, tokens_per_s=4.) for i in range(1, 4)), dict(kind='eval', time=1., step=3, loss=1., accuracy=.5)]
    def make(self, rng):
        lines = [damage_json(e, rng) if rng.random()<.3 else e for e in self.lines]
        raw = b'\n'.join(map(dumps, lines))+b'\n'
        (self.folder/'events.jsonl').write_bytes(damage(raw, rng) if rng.random()<.5 else raw)
    def read(self):
        from lora_nb.trainer import PastRun
        run = PastRun(self.folder)
        repr(run),run.log,run.evals


class AdapterFolder(Reader):
    def good(self):
        from lora_nb.adapter import AdapterMismatch,BadAdapterFile,UnsupportedAdapter,add_lora
        self.own = BadAdapterFile,UnsupportedAdapter,AdapterMismatch,FileNotFoundError
        model = tiny_model()
        a = add_lora(model, r=2, alpha=4, targets='attention', rank_pattern={'q_proj':3}, modules_to_save=['norm'])
        self.start = a.save(self.folder/'good')
        a.remove()
        self.files = {f.name: f.read_bytes() for f in self.start.iterdir()}
        shutil.rmtree(self.start)
        self.model = model
        self.modules = [(n, id(m)) for n,m in model.named_modules()]
        self.weights = {k: v.clone() for k,v in model.state_dict().items()}
    def make(self, rng):
        files = dict(self.files)
        if rng.random()<.6: files['adapter_config.json'] = dumps(damage_json(json.loads(files['adapter_config.json']), rng)) if rng.random()<.85 else damage(files['adapter_config.json'], rng)
        else: files['adapter_model.safetensors'] = damage_safetensors(files['adapter_model.safetensors'], rng)
        for name,raw in files.items(): (self.folder/name).write_bytes(raw)
    def read(self):
        from lora_nb.adapter import load_adapter
        load_adapter(self.model, self.folder).remove()
    def unchanged(self):
        import torch
        now = self.model.state_dict()
        return [(n, id(m)) for n,m in self.model.named_modules()]==self.modules and all(torch.equal(now[k], v) for k,v in self.weights.items()) and all(p.requires_grad for p in self.model.parameters())


class Inspector(AdapterFolder):
    def good(self):
        from lora_nb.widgets.adapter_inspector import norm_frame
        super().good()
        self.own,self.look = (ValueError,FileNotFoundError),norm_frame
    def read(self): self.look(self.folder)


class Folder(Reader):
    "A model's folder: config, weights or index, tokenizer, one of them damaged."
    quant = False
    def good(self):
        from lora_nb.models import load_model,save_model
        from lora_nb.quantize import NF4
        here = self.folder/'good'
        save_model(tiny_model(), here, tiny_tokenizer())
        if self.quant:
            model,tok = load_model(here, quant=NF4(double=True), device='cpu')
            shutil.rmtree(here)
            save_model(model, here, tok)
        self.files = {f.name: f.read_bytes() for f in here.iterdir()}
        shutil.rmtree(here)
    def make(self, rng):
        files = dict(self.files)
        if rng.random()<.1:
            head = files['model.safetensors']
            names = json.loads(head[8:8+struct.unpack('<Q', head[:8])[0]])
            files['model.safetensors.index.json'] = dumps(damage_json(dict(metadata={}, weight_map={k: 'model.safetensors' for k in names if k!='__metadata__'}), rng))
        else:
            name = rng.choices(list(files), [6 if n=='config.json' else 6 if n.endswith('.safetensors') else 1 for n in files])[0]
            if name.endswith('.json'): files[name] = dumps(damage_json(json.loads(files[name]), rng)) if rng.random()<.85 else damage(files[name], rng)
            elif name.endswith('.safetensors'): files[name] = damage_safetensors(files[name], rng)
            else: files[name] = damage(files[name], rng)
        for name,raw in files.items(): (self.folder/name).write_bytes(raw)
    def read(self):
        from lora_nb.models import load_model
        load_model(self.folder, device='cpu')


class FourBit(Folder): quant = True


class Checkpoint(Reader):
    "`Trainer.resume` and the run's restoring, from a checkpoint that was changed."
    def good(self):
        from lora_nb.adapter import add_lora
        from lora_nb.data import Sample
        from types import SimpleNamespace
        from lora_nb.trainer import Trainer
        self.data = SimpleNamespace(train=[Sample([3, 4, 5], [-100, 4, 5], i) for i in range(4)], val=[], tok=SimpleNamespace(pad_token_id=0), max_len=8)
        self.model = tiny_model()
        add_lora(self.model, r=2, alpha=4, targets='attention')
        run = Trainer(self.model, self.data, out=self.folder/'run', epochs=1, batch_size=4).start().wait(False)
        self.files = {f.name: f.read_bytes() for f in run.checkpoint.iterdir()}
        shutil.rmtree(self.folder/'run')
        self.adapter = run.adapter
    def make(self, rng):
        files,name = dict(self.files),rng.choice(['run.json', 'training.safetensors'])
        files[name] = damage_safetensors(files[name], rng) if name!='run.json' else dumps(damage_json(json.loads(files[name]), rng)) if rng.random()<.85 else damage(files[name], rng)
        self.at = self.folder/'checkpoint-1'
        self.at.mkdir()
        for name,raw in files.items(): (self.at/name).write_bytes(raw)
        self.was = {k: v.clone() for k,v in self.adapter.state_dict().items()}
    def read(self):
        from lora_nb.trainer import Run,Trainer
        t = Trainer.resume(self.at, self.model, self.data)
        t._restore(Run(t, self.folder/'run'))
        self.was = {k: v.clone() for k,v in self.adapter.state_dict().items()}
    def unchanged(self):
        import torch
        return all(torch.equal(v, self.was[k]) for k,v in self.adapter.state_dict().items())


class Template(Reader):
    PARTS = ["{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}", "{% macro f(n) %}{{ f(n-1) }}{{ f(n-1) }}{% endmacro %}{{ f(50) }}", "{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}",
             "{{ range(10**9) }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{{ 1/0 }}", "{{ undefined.x }}", "{% include 'x' %}", "{{ lipsum.__globals__ }}", "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ messages[0]['content'] | attr('format') }}", "{% set ns = namespace(x=0) %}{{ ns.x }}", "{{ '%s' % messages }}", "{{ cycler.__init__ }}"]
    def good(self):
        from lora_nb.data import DataError
        self.own,self.tok = (DataError,),tiny_tokenizer()
    def make(self, rng):
        text,i = TEMPLATE,rng.randrange(len(TEMPLATE))
        if rng.random()<.3: text = text[:i]+rng.choice(self.PARTS)+text[i:] if rng.random()<.3 else rng.choice(self.PARTS[2:])+text
        else: text = damage(text.encode(), rng).decode('utf-8', 'replace')
        self.tok.chat_template = text
    def read(self):
        from lora_nb.data import encode_chat
        encode_chat(self.tok, ROWS[0]['messages'])


READERS = dict(jsonl=Jsonl, csv=Csv, text=Text, gguf=Gguf, codes=Codes, events=Events, adapter=AdapterFolder, inspector=Inspector, checkpoint=Checkpoint, folder=Folder, four_bit=FourBit, gguf_model=GgufModel, template=Template)

# --- one input ------------------------------------------------------------------------------------------------------------

def peak():
    with open('/proc/self/status') as f: return next(int(line.split()[1])*1024 for line in f if line.startswith('VmHWM'))


def forget_peak():
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')


def in_lora_nb(e):
    "Was it raised by a line of lora_nb?"
    frames = traceback.extract_tb(e.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def contents(folder): return {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob('*')}


def one(reader, name, seed, i):
    "(outcome, seconds, bytes): 'accepted', 'refused', or what is wrong."
    for p in reader.folder.iterdir(): shutil.rmtree(p) if p.is_dir() else p.unlink()
    reader.make(random.Random(f'{name} {seed} {i}'))
    before = contents(reader.folder)
    forget_peak()
    held,t = peak(),time.perf_counter()
    try:
        reader.read()
        outcome = 'accepted'
    except reader.own as e: outcome = 'refused' if in_lora_nb(e) else f'{type(e).__name__} that lora_nb did not raise: {e}'
    except BaseException as e: outcome = f'{type(e).__name__}: {e}'
    seconds,grown = time.perf_counter()-t,peak()-held
    if seconds>SECONDS: outcome = f'took {seconds:.1f} s'
    elif grown>BYTES: outcome = f'took {grown>>20} MB'
    elif outcome!='accepted' and not reader.unchanged(): outcome = 'changed the model: '+outcome
    elif contents(reader.folder)!=before: outcome = f'wrote {sorted(set(contents(reader.folder))-set(before))}'
    return outcome[:300],seconds,grown


def scratch(): return tempfile.TemporaryDirectory(dir='/dev/shm' if os.path.isdir('/dev/shm') else None)


def worker(name, seed, start, stop):
    "Reads inputs start…stop; a line of JSON for each, after a line with its number."
    import torch
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    import lora_nb.all, transformers # noqa: F401
    transformers.logging.set_verbosity_error()
    out = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with scratch() as folder:
        os.chdir(folder)
        reader = READERS[name](Path(folder))
        size = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size+6*2**30,)*2) # this machine's memory is not for the fuzzer to fill
        for i in range(start, stop):
            print(i, file=out)
            print(json.dumps(one(reader, name, seed, i)), file=out)


def fuzz(name, seed, n, say=print):
    "The outcomes of n inputs to a reader: {outcome: [numbers]}, worst seconds, worst bytes."
    import select
    seen,worst,start = {},[0., 0],0
    while start<n:
        p = subprocess.Popen([sys.executable, __file__, '--worker', name, str(seed), str(start), str(n)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1)
        at,why = -1 if start==0 else start,None
        while True:
            ready,_,_ = select.select([p.stdout], [], [], 120 if at<=start else 30)
            if not ready: why = 'hangs'; break
            line = p.stdout.readline()
            if not line: break
            if line[0]!='[': at = int(line)
            else:
                outcome,seconds,grown = json.loads(line)
                seen.setdefault(outcome, []).append(at)
                worst = [max(worst[0], seconds), max(worst[1], grown)]
                start = at+1
        if why: p.kill()
        p.wait()
        if at<0: raise SystemExit(f"The worker for {name} does not start: python {__file__} --worker {name} {seed} 0 1")
        if start<n:
            seen.setdefault(why or f'the interpreter died ({p.returncode})', []).append(at)
            start = at+1
    return seen,worst


def atheris_run(seconds):
    "libFuzzer over the readers that are Python's own work."
    import atheris, torch # noqa: F401
    warnings.simplefilter('ignore')
    with atheris.instrument_imports(include=['lora_nb.data', 'lora_nb.models', 'lora_nb.trainer']): import lora_nb.all # noqa: F401
    folder = scratch()
    readers = {k: READERS[k](Path(folder.name)) for k in ('jsonl', 'csv', 'gguf', 'events')}
    names = dict(jsonl='rows.jsonl', csv='rows.csv', gguf='m.gguf', events='events.jsonl')
    def test(data):
        if not data: return
        name = list(readers)[data[0] % len(readers)]
        r = readers[name]
        r.file = r.folder/names[name]
        r.file.write_bytes(data[1:])
        try: r.read()
        except r.own as e:
            if not in_lora_nb(e): raise
    seeds = tempfile.mkdtemp(dir=folder.name)
    for i,(name,r) in enumerate(readers.items()):
        for k in range(20):
            r.make(random.Random(f'{name} {k}'))
            Path(seeds, f'{name}-{k}').write_bytes(bytes([i])+(r.folder/names[name]).read_bytes())
    atheris.Setup([sys.argv[0], f'-max_total_time={seconds}', '-timeout=5', '-rss_limit_mb=4000', '-print_final_stats=1', f'-artifact_prefix={tempfile.gettempdir()}/', seeds], test)
    atheris.Fuzz()


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--inputs', type=int, default=120_000)
    p.add_argument('--reader', choices=READERS)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--only', type=int, help='repeat one input of --reader, with its traceback')
    p.add_argument('--atheris', type=int, metavar='SECONDS')
    args = p.parse_args()
    os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    if args.atheris: return atheris_run(args.atheris)
    if args.only is not None:
        with scratch() as folder:
            reader = READERS[args.reader](Path(folder))
            for q in reader.folder.iterdir(): shutil.rmtree(q) if q.is_dir() else q.unlink()
            reader.make(random.Random(f'{args.reader} {args.seed} {args.only}'))
            return reader.read()
    rows,bad = [],{}
    for name,share in SHARES.items():
        if args.reader and name!=args.reader: continue
        n = args.inputs if args.reader else round(args.inputs*share)
        t = time.time()
        seen,(seconds,grown) = fuzz(name, args.seed, n)
        wrong = {k: v for k,v in seen.items() if k not in ('accepted', 'refused')}
        bad[name] = wrong
        rows.append((name, n, len(seen.get('accepted', [])), len(seen.get('refused', [])), sum(map(len, wrong.values())), seconds, grown/2**20))
        print('{:11} {:7,} inputs  {:7,} accepted  {:7,} refused  {:5,} wrong  worst {:5.2f} s  {:6.1f} MB'.format(*rows[-1]), f'  in {time.time()-t:.0f} s', flush=True)
        for k,v in sorted(wrong.items(), key=lambda o: -len(o[1]))[:25]: print(f'    {len(v)} times, first {v[0]}: {k}', flush=True)
    total = [sum(r[k] for r in rows) for k in range(1, 5)]
    print('{:11} {:7,} inputs  {:7,} accepted  {:7,} refused  {:5,} wrong'.format('together', *total))
    sys.exit(bool(total[-1]))


if __name__=='__main__':
    if sys.argv[1:2]==['--worker']: worker(sys.argv[2], *map(int, sys.argv[3:]))
    else: main()
