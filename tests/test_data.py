"Which tokens carry a label, and what is refused with file and line."
import json

import pytest
from hypothesis import given, strategies as st

from lora_nb.data import DataError, answer_spans, batch_order, chat_data, collate, encode_chat, preview, right_answer


@pytest.fixture(scope='module')
def tok(smol): return smol[1]


def write(path, *lines):
    path.write_text('\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines)+'\n', encoding='utf-8')
    return path


def learned(tok, s): return tok.decode([t for t, l in zip(s.input_ids, s.labels) if l != -100])


U, A, S = (lambda role: lambda text: dict(role=role, content=text))('user'), (lambda t: dict(role='assistant', content=t)), (lambda t: dict(role='system', content=t))


@pytest.mark.parametrize('messages,want', [
    ([U('Hi'), A('Hello.')], 'Hello.<|im_end|>'),
    ([S('Be brief.'), U('Hi'), A('Hello.')], 'Hello.<|im_end|>'),
    ([U('Hi'), A('One.'), U('More'), A('Two.')], 'One.<|im_end|>Two.<|im_end|>'),
    ([U('Say Hello.'), A('Hello.'), U('Hello.'), A('Hello.')], 'Hello.<|im_end|>Hello.<|im_end|>'),
    ([U('assistant\n'), A('日本語 and 🎈')], '日本語 and 🎈<|im_end|>'),
])
def test_only_the_assistants_tokens_are_learned(tok, messages, want):
    s = encode_chat(tok, messages)
    assert learned(tok, s) == want
    assert tok.decode(s.input_ids) == tok.apply_chat_template(messages, tokenize=False).rstrip()


def test_all_labels(tok):
    s = encode_chat(tok, [U('Hi'), A('Hello.')], labels='all')
    assert s.labels == s.input_ids


def test_a_template_that_rewrites_history_is_refused(tok):
    import copy
    odd = copy.deepcopy(tok)
    odd.chat_template = "{% for m in messages %}{{ loop.length }}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(DataError, match='differently'): answer_spans(odd, [U('a'), A('b'), U('c'), A('d')])


@pytest.mark.parametrize('line,says', [
    ('{"messages": [', 'line 2: not JSON'),
    ('[1, 2]', 'line 2: a row must be an object'),
    ({'question': 'a'}, r"line 2: fields \['question'\] found"),
    ({'messages': []}, "line 2: 'messages' must be"),
    ({'messages': [{'role': 'user'}]}, "line 2: 'messages' must be"),
    ({'messages': [{'role': 'user', 'content': 3}]}, "line 2: 'messages' must be"),
    ({'messages': [{'role': 'user', 'content': 'only a question'}]}, 'line 2: No token to learn from'),
    ({'prompt': 'word '*100, 'completion': 'late'}, 'line 2: No token to learn from.*raise max_len'),
])
def test_a_bad_row_is_named_by_file_and_line(tok, tmp_path, line, says):
    p = write(tmp_path/'rows.jsonl', {'prompt': 'a', 'completion': 'b'}, line)
    with pytest.raises(DataError, match=f'rows.jsonl, {says}'): chat_data(p, tok, max_len=64, val=0)


def test_missing_empty_and_foreign_files(tok, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.jsonl'): chat_data('nowhere.jsonl', tok)
    with pytest.raises(DataError, match='empty'): chat_data(write(tmp_path/'e.jsonl', ''), tok)
    with pytest.raises(DataError, match='.jsonl'): chat_data(write(tmp_path/'a.parquet', 'x'), tok)
    with pytest.raises(DataError, match="'split' must say"): chat_data([{'prompt': 'a', 'completion': 'b'}], tok, val='split')
    with pytest.raises(ValueError, match='val=1.5'): chat_data([{'prompt': 'a', 'completion': 'b'}], tok, val=1.5)


def test_a_dataset_and_a_list_are_read_alike(tok):
    from datasets import Dataset
    rows = [{'prompt': f'q{i}', 'completion': f'a{i}'} for i in range(20)]
    a, b = (chat_data(src, tok, val=.25) for src in (rows, Dataset.from_list(rows)))
    assert [s.input_ids for s in a.train] == [s.input_ids for s in b.train] and len(a.val) == 5
    assert not {s.row for s in a.train} & {s.row for s in a.val}


def test_cut_samples_are_counted(tok):
    d = chat_data([{'prompt': 'q', 'completion': 'word '*200}], tok, max_len=64, val=0)
    assert len(d.train[0]) == 64 and d.train[0].cut > 0 and '1 samples cut to 64' in repr(d)


def test_preview_marks_just_the_answer(tok):
    d = chat_data([{'prompt': 'q', 'completion': '<script>x</script>'}], tok, val=0)
    assert preview(d, 0).endswith('⟦<script>x</script><|im_end|>⟧')


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 17), st.integers(0, 5))
def test_each_sample_stands_in_just_one_batch(lengths, size, epoch):
    batches = batch_order(lengths, size, epoch=epoch)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths))) and max(map(len, batches)) <= size


def test_padding_carries_no_label(tok):
    d = chat_data([{'prompt': 'q', 'completion': 'a'*n} for n in (1, 50)], tok, val=0)
    b = collate(d.train, pad_id=7)
    short = len(d.train[0])
    assert (b['input_ids'][0, short:] == 7).all() and (b['labels'][0, short:] == -100).all()


@pytest.mark.parametrize('answer,terms,right', [
    ('Low-rank adaptation', ['low rank', 'adaptation'], True), ('LOW RANK  adaptation!', ['low-rank', 'adaptation'], True),
    ('slow rank adaptation', ['low-rank'], False), ('adaptations', ['adaptation'], False), ('adaptations', ['adaptation|adaptations'], True),
    ('it saves 0.373 bits', ['0.373'], True), ('it saves 10.373 bits', ['0.373'], False), ('', ['x'], False)])
def test_right_answer(answer, terms, right): assert right_answer(answer, terms) is right
