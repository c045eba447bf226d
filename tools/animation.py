"The README's pictures of LiveRun: a real QLoRA run of SmolLM2 in a real JupyterLab, watched by a browser. python tools/animation.py [steps]"
import io, sys, tempfile, time
from pathlib import Path
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT/'tests'), str(ROOT)]
from browser import LivePage, running, until

IMAGES, LIMIT = ROOT/'nbs/images', 1_500_000
CELLS = [f'import sys; sys.path.insert(0, {str(ROOT)!r})',
         'from lora_nb.all import *\nmodel, tok = load_model("smollm2", quant=NF4(double=True))\nadapter    = add_lora(model, r=16, alpha=32)\ndata       = chat_data(example_data(), tok, max_len=128, val=.01)',
         'run = Trainer(model, data, lr=1.5e-3, epochs={epochs}, batch_size=4, eval_every=6, out="runs/first").start()\nLiveRun(run, questions=["What does LoRA stand for?"], ask_every=60)']


def shot(of, **kw): return Image.open(io.BytesIO(of.screenshot(**kw))).convert('RGB')


def frames(lab, live, every=4.):
    "A picture of the widget every few seconds, until the run is over."
    seen, box = [], lab.page.locator('.lnb').first
    while True:
        over, start = 'running' not in live.state(), time.monotonic()
        seen.append(shot(box))
        if over: return seen
        time.sleep(max(0, every-(time.monotonic()-start)))


def animation(pictures, width=880, most=36):
    "The frames of one size, at most `most` of them, with one palette."
    pictures = [pictures[round(i*(len(pictures)-1)/(most-1))] for i in range(most)] if len(pictures) > most else pictures
    height = min(p.height for p in pictures)
    small = [p.crop((0, 0, p.width, height)).resize((width, round(height*width/p.width)), Image.LANCZOS) for p in pictures]
    palette = small[-1].quantize(64, method=Image.Quantize.MEDIANCUT)
    return [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in small]


def save_gif(pictures, path, ms=220):
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[ms]*(len(pictures)-1)+[2500], loop=0, optimize=True, disposal=1)
    return path.stat().st_size


def main(steps=24):
    cells = [c.replace('{epochs}', f'{steps}*4/len(data.train)') for c in CELLS]
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        work, home = Path(tmp)/'work', Path(tmp)/'home'
        work.mkdir(); home.mkdir()
        with running(work, home, 'first', *cells, width=1400, height=1150) as lab:
            live = LivePage(lab).appear(300)
            lab.page.locator('.jp-Cell').nth(2).scroll_into_view_if_needed()
            until(lambda: len(live.points()) > 1, what='the loss has two points')
            pictures = frames(lab, live)
            lab.page.locator('.jp-Cell').nth(1).evaluate('el => el.scrollIntoView({block: "start"})')
            lab.page.wait_for_timeout(1500)
            still = shot(lab.page)
            text = live.text()
    still.quantize(128, dither=Image.Dither.NONE).save(IMAGES/'live_run.png', optimize=True)
    moving = animation(pictures)
    while (size := save_gif(moving, IMAGES/'live_run.gif')) > LIMIT: moving = moving[::2]+moving[-1:]
    print(f"{len(moving)} frames of {len(pictures)}, {moving[0].width}×{moving[0].height}, {size/1e6:.2f} MB; the still {(IMAGES/'live_run.png').stat().st_size/1e3:.0f} kB\n{text[:300]}")


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
