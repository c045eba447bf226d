"The tutorial on four bits: what it says held is what its committed outputs show."
import re
from pathlib import Path

import nbformat
from outputs import printed

PATH = Path(__file__).resolve().parent.parent/'nbs/tutorials/02_four_bits.ipynb'


def claims_hold(text):
    "The perplexities that the table shows, in the order that the prose states."
    ppl = {n: float(re.search(rf'{n} +[\d.]+ +([\d.]+)', text)[1]) for n in ('fp32', 'NF4', 'FP4', 'INT4', 'NF4, double')}
    before, now = map(float, re.search(r'perplexity ([\d.]+) before, ([\d.]+) now', text).groups())
    assert ppl['fp32'] < ppl['NF4'] < ppl['FP4'] < ppl['INT4'] and abs(ppl['NF4, double']-ppl['NF4']) < .02*ppl['NF4'] and now < before
    assert '0.373 bits a parameter' in text


def test_the_committed_outputs_show_what_the_prose_says():
    claims_hold(printed(nbformat.read(PATH, as_version=4)))
