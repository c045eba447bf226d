"A tiny model that talks, for the tests of ChatCompare (imported by them and by the notebooks that they drive)."
import time
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from live_tiny import tiny_trainer


def words(said=None, n=64):
    "A tokenizer of n words with a chat template that writes the messages' text alone; `said` is the text of word 7."
    t = Tokenizer(models.WordLevel({'<unk>': 0, '<pad>': 1, **{said if said and i==7 else f'w{i}': i for i in range(2, n)}}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, unk_token='<unk>', pad_token='<pad>')
    tok.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tok


def chatty(out, slow=0., said=None, dropout=0., **settings):
    "A trainer whose adapter says something else than its base, and never comes to an end by itself; `slow` seconds are slept at each token."
    trainer = tiny_trainer(out, **settings)
    trainer.data.tok = words(said)
    trainer.model.generation_config.eos_token_id = None
    with torch.no_grad():
        for l in trainer.adapter.layers.values(): l.B['default'].normal_(std=.2)
    for l in trainer.adapter.layers.values(): l.dropout['default'] = dropout
    if slow: trainer.model.register_forward_hook(lambda m, *_: None if m.training or torch.is_grad_enabled() else time.sleep(slow))
    return trainer
