"A real run of a few thousand random parameters, for the tests of LiveRun (imported by them and by the notebooks that they drive)."
import time
from types import SimpleNamespace
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lora_nb.adapter import add_lora
from lora_nb.data import Sample
from lora_nb.trainer import Trainer


def tiny_trainer(out, epochs=4, hidden=32, **settings):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=hidden, intermediate_size=3*hidden//2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    add_lora(model, r=4, alpha=8)
    g = torch.Generator().manual_seed(1)
    def sample(i):
        ids = torch.randint(3, 64, (12,), generator=g).tolist()
        return Sample(ids, [-100]*4+ids[4:], i)
    data = SimpleNamespace(train=[sample(i) for i in range(40)], val=[sample(i) for i in range(40, 48)], tok=SimpleNamespace(pad_token_id=0))
    return Trainer(model, data, out=out, **dict(epochs=epochs, batch_size=8, lr=2e-2) | settings)


def tiny_run(out, pace=0., **settings):
    "Started; `pace` seconds are slept after each step."
    run = tiny_trainer(out, **settings).start()
    if pace: run.subscribe(lambda e: e['kind']=='step' and time.sleep(pace))
    return run
