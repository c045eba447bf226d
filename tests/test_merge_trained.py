"Merging the adapter that the first tutorial trained: what the report says of SmolLM2 is what plain transformers finds in each folder."
import json, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from lora_nb.adapter import load_adapter
from lora_nb.data import chat_data
from lora_nb.merge import chosen, merge, merge_report, recommend
from lora_nb.models import load_model
from lora_nb.quantize import NF4

DATA = Path(__file__).resolve().parent.parent/'nbs/data/lora_qa.jsonl'
KINDS = {'fp32': torch.float32, 'bf16': torch.bfloat16, '4bit': '4bit'}

FRESH = '''
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
rows, unmerged = json.loads(open(sys.argv[1]).read()), load_file(sys.argv[2])
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()    # it has no dropout; in eval mode bitsandbytes multiplies in bf16 where the CPU can
    gap = size = kl = loss = changed = n = 0
    for i, (ids, labels) in enumerate(rows):
        at = [j for j in range(len(ids)-1) if labels[j+1] != -100]
        with torch.no_grad(): b = model(torch.tensor([ids])).logits[0, at].double()
        a, t = unmerged[str(i)].double(), torch.tensor([labels[j+1] for j in at])
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        gap += (a-b).square().sum().item(); size += a.square().sum().item(); n += len(at)
        kl += (p.exp()*(p-q)).sum().item(); loss -= q.gather(1, t[:,None]).sum().item(); changed += (a.argmax(-1) != b.argmax(-1)).sum().item()
    print(json.dumps(dict(logits=(gap/size)**.5, kl=kl/n, loss=loss/n, changed=changed/n)))
assert 'lora_nb' not in sys.modules and 'peft' not in sys.modules
'''


@torch.no_grad()
def unmerged_logits(model, samples):
    "Logits that predict labelled tokens, by sample."
    at = lambda s: [j for j in range(len(s)-1) if s.labels[j+1] != -100]
    return {str(i): model(torch.tensor([s.input_ids])).logits[0, at(s)].contiguous() for i, s in enumerate(samples)}


@pytest.mark.slow
def test_the_report_on_a_trained_smollm2_is_what_plain_transformers_finds(tmp_path, live_qlora):
    model, tok = load_model('smollm2', quant=NF4(double=True), dtype=torch.float32, device='cpu')
    data = chat_data(DATA, tok, max_len=256, val='split')
    held_out = data.val[::len(data.val)//16][:16]
    adapter = load_adapter(model, live_qlora.folder/'my-adapter')
    report = merge_report(model, adapter, held_out, original='smollm2')
    print(recommend(report), report.drop(columns=['into', 'dtype']).to_string(), sep='\n')
    assert report.attrs['unmerged'] < report.attrs['without']/3          # it has learnt
    model.eval()
    (tmp_path/'fresh.py').write_text(FRESH)
    (tmp_path/'rows.json').write_text(json.dumps([(s.input_ids, s.labels) for s in held_out]))
    save_file(unmerged_logits(model, held_out), tmp_path/'unmerged.safetensors')
    folders = {way: tmp_path/row['into']/row['dtype'] for way, row in report.iterrows()}
    for way, row in report.iterrows():
        merge(model, adapter, folders[way], into='base' if row['into'] == 'base' else 'smollm2', dtype=KINDS[row['dtype']], tok=tok)
    out = subprocess.run([sys.executable, 'fresh.py', 'rows.json', 'unmerged.safetensors', *map(str, folders.values())], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr[-2000:]
    for (way, row), line in zip(report.iterrows(), out.stdout.splitlines(), strict=True):
        found = json.loads(line)
        print(f"{way:15}", '  '.join(f'{k} {row[k]:.6g} told, {found[k]:.6g} found' for k in found))
        for k in ('logits', 'kl', 'loss'): assert row[k] == pytest.approx(found[k], rel=1e-3, abs=1e-5), (way, k)
        assert row['changed'] == pytest.approx(found['changed'], abs=2/report.attrs['tokens'])
    assert chosen(report).startswith('base') and report.loc['base, 4bit', 'kl'] > 100*report.loc['base, bf16', 'kl']
