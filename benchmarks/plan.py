"""What `plan` says beforehand beside what the process then takes, on the real SmolLM2-135M on this CPU.

    python benchmarks/plan.py [--only N …] [--heap]

Each setting in a new process: the plan, then the model, an adapter, and two steps of `Trainer` with every token learned from;
then the highest memory that the process ever had. A ratio above 1: the plan asked for more than was taken.
With --heap the same run again without `free_at_once`: what the C library's heap would hold on to."""
import argparse, json, subprocess, sys, tempfile
from types import SimpleNamespace

SETTINGS = [dict(seq=256, batch=4), dict(seq=512, batch=8), dict(seq=512, batch=8, checkpointing=True), dict(seq=1024, batch=2, r=64), dict(seq=2048, batch=1), dict(seq=128, batch=32),
            dict(seq=256, batch=4, quant=None), dict(seq=256, batch=8, r=64, optimizer="adamw8bit"), dict(seq=256, batch=2, r=256), dict(seq=512, batch=4, targets="attention"),
            dict(seq=256, batch=4, dropout=.1), dict(seq=512, batch=4, dropout=.1, checkpointing=True), dict(seq=1024, batch=4, checkpointing=True), dict(seq=384, batch=6, r=32)]


def one(setting, heap):
    "Plan and peak of one setting, MiB, in this process."
    import torch
    import lora_nb.trainer
    from lora_nb.adapter import add_lora
    from lora_nb.data import Sample
    from lora_nb.fit import plan
    from lora_nb.memory import process_memory
    from lora_nb.models import load_model
    from lora_nb.quantize import NF4
    if heap: lora_nb.trainer.free_at_once = lambda: None
    s = dict(quant=NF4(double=True), r=16, targets="all-linear", dropout=0., checkpointing=False, optimizer="adamw") | setting
    said = plan("smollm2", gpu="cpu", **s).total
    model, tok = load_model("smollm2", quant=s["quant"])
    add_lora(model, r=s["r"], targets=s["targets"], dropout=s["dropout"])
    ids = torch.randint(model.config.vocab_size, (2*s["batch"], s["seq"]), generator=torch.Generator().manual_seed(0)).tolist()
    data = SimpleNamespace(train=[Sample(i, i, n) for n, i in enumerate(ids)], val=[], tok=tok)
    with tempfile.TemporaryDirectory() as out:
        lora_nb.trainer.Trainer(model, data, out=f"{out}/run", batch_size=s["batch"], epochs=1, checkpointing=s["checkpointing"], optimizer=s["optimizer"]).start().wait(False)
    return said/2**20, process_memory()["peak"]/2**20


def apart(n, heap=False):
    "`one` in a new process."
    return json.loads(subprocess.run([sys.executable, __file__, "--one", str(n), *["--heap"]*heap], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    a = argparse.ArgumentParser()
    a.add_argument("--one", type=int)
    a.add_argument("--heap", action="store_true")
    a.add_argument("--only", type=int, nargs="*")
    args = a.parse_args()
    if args.one is not None: print(json.dumps(one(SETTINGS[args.one], args.heap))); sys.exit()
    ratios = []
    for n in args.only if args.only is not None else range(len(SETTINGS)):
        said, peak = apart(n)
        ratios.append(said/peak)
        print(f"{', '.join(f'{k}={v}' for k, v in SETTINGS[n].items()):<56} plan {said:6.0f} MiB  measured {peak:6.0f}  plan/measured {said/peak:.2f}" + (f"  heap {apart(n, True)[1]:6.0f}" if args.heap else ""), flush=True)
    print(f"plan/measured: min {min(ratios):.2f}  max {max(ratios):.2f} over {len(ratios)} settings")
