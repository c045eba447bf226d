"A tiny model, samples for it and a true merge report: for the tests of QuantExplorer and MergeReport (imported by the notebooks that they drive)."
import copy
import torch
from conftest import tiny_llama
from lora_nb.adapter import add_lora
from lora_nb.data import Sample
from lora_nb.linear4bit import Linear4bit
from lora_nb.merge import merge_report
from lora_nb.models import quantisable
from lora_nb.quantize import NF4

model = tiny_llama()
samples = [Sample(x, x, i) for i, x in enumerate(torch.randint(0, 40, (8, 12), generator=torch.Generator().manual_seed(1)).tolist())]


def tiny_report():
    "Of an adapter with some update on the model in NF4."
    packed = copy.deepcopy(model)
    for path, layer in quantisable(packed).items(): packed.set_submodule(path, Linear4bit.from_linear(layer, NF4()))
    adapter = add_lora(packed, r=4, alpha=8)
    with torch.no_grad():
        for layer in adapter.layers.values(): layer.B['default'].normal_(0, .05)
    return merge_report(packed, adapter, samples)
