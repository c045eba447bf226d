"The run: its loss is a plain loop's, its buttons work, and nothing is lost when it ends."
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import counting, tiny_llama

from lora_nb.adapter import add_lora
from lora_nb.data import batch_order, collate
from lora_nb.trainer import NonFiniteLoss, OutOfMemory, Run, Trainer, checkpoints, release_threads, score_answers, to_tensorboard


def trainer(tmp_path, seed=0, dropout=0., **settings):
    model = tiny_llama(seed)
    add_lora(model, r=8, alpha=16, dropout=dropout)
    return Trainer(model, counting(), out=tmp_path/'run', **{'lr': 1e-2, 'epochs': 3, **settings})


def until(condition, seconds=20):
    end = time.time()+seconds
    while not condition():
        assert time.time() < end, 'waited too long'
        time.sleep(.005)


@pytest.mark.parametrize('schedule', ['cosine', 'linear'])
def test_fifty_steps_are_those_of_a_plain_peft_loop(tmp_path, schedule):
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import get_scheduler
    t = trainer(tmp_path, epochs=8, schedule=schedule, weight_decay=.1)
    start = {k: v.clone() for k, v in t.adapter.state_dict().items()}
    peer = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=16, target_modules='all-linear'))
    assert not set_peft_model_state_dict(peer, start).unexpected_keys
    data, params = counting(), [p for p in peer.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=1e-2, weight_decay=.1)
    sched = get_scheduler(schedule, opt, round(.05*56), 56)
    losses = []
    for epoch in range(8):
        for idx in batch_order([len(s) for s in data.train], 8, epoch=epoch):
            b = collate([data.train[i] for i in idx])
            loss = peer(**b).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.)
            opt.step(), sched.step(), opt.zero_grad()
            losses.append(loss.item())
    run = t.fit()
    assert run.total_steps == 56
    assert run.log.loss.tolist() == pytest.approx(losses, abs=1e-4)


def test_start_returns_before_the_work_is_done(tmp_path):
    run = trainer(tmp_path, epochs=40).start()
    assert run.state == 'running' and not run._done.is_set()
    until(lambda: run.step > 2)
    run.stop()
    assert run.wait(False).state == 'stopped'


def test_pause_holds_and_resume_goes_on(tmp_path):
    run = trainer(tmp_path, epochs=60).start()
    until(lambda: run.step > 1)
    run.pause()
    until(lambda: run.state == 'paused')
    at = run.step
    time.sleep(.4)
    assert run.step == at
    run.resume()
    until(lambda: run.step > at+1)
    run.stop()
    run.wait(False)


def test_stop_while_paused_ends_it(tmp_path):
    run = trainer(tmp_path, epochs=60).start()
    run.pause()
    until(lambda: run.state == 'paused')
    run.stop()
    assert run.wait(False).state == 'stopped' and run.checkpoint.exists()


def test_an_interrupt_stops_with_a_checkpoint(tmp_path):
    run = trainer(tmp_path, epochs=400).start()
    until(lambda: run.step > 2)
    threading.Timer(.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt): run.wait(False)
    assert run.state == 'stopped' and (run.checkpoint/'adapter_model.safetensors').exists()


def test_events_on_disk_are_those_in_memory(tmp_path):
    run = trainer(tmp_path).fit()
    assert [json.loads(line) for line in (run.out/'events.jsonl').read_text().splitlines()] == run.events
    assert [e['step'] for e in run.events if e['kind'] == 'step'] == list(range(1, run.total_steps+1))


@pytest.mark.parametrize('dropout,settings', [(0., {}), (.1, {}), (.1, dict(accum=2)), (0., dict(neftune=5.)), (0., dict(optimizer='adamw8bit')), (0., dict(lr_ratio=16., patience=9)), (0., dict(batch_size=3))])
def test_a_resumed_run_is_the_uncut_run(tmp_path, dropout, settings):
    whole = trainer(tmp_path, dropout=dropout, **settings).fit()
    t = trainer(tmp_path, dropout=dropout, **settings)
    cut = Run(t, tmp_path/'cut')
    cut.subscribe(lambda e: e['kind'] == 'step' and e['step'] == 5 and cut.stop())
    t._work(cut)
    assert cut.state == 'stopped' and cut.step == 5
    model = tiny_llama()
    add_lora(model, r=8, alpha=16, dropout=dropout)
    rest = Trainer.resume(cut.checkpoint, model, counting()).fit()
    assert cut.log.loss.tolist()+rest.log.loss.tolist() == whole.log.loss.tolist()


def test_resume_refuses_other_data(tmp_path):
    run = trainer(tmp_path, epochs=1).fit()
    model = tiny_llama()
    add_lora(model, r=8, alpha=16)
    with pytest.raises(ValueError, match='56 samples, data has 32'): Trainer.resume(run.checkpoint, model, counting(n=40))


def test_an_older_run_is_never_overwritten(tmp_path):
    a, b = trainer(tmp_path, epochs=1).fit(), trainer(tmp_path, epochs=1).fit()
    assert (a.out.name, b.out.name) == ('run', 'run-2') and (a.checkpoint/'run.json').exists()


@pytest.mark.parametrize('bad', [dict(lr=0), dict(lr=math.nan), dict(epochs=0), dict(batch_size=0), dict(accum=1.5), dict(warmup=1.), dict(schedule='cos'),
                                 dict(clip=-1), dict(eval_every=0), dict(weight_decay=-.1)])
def test_bad_settings_name_themselves(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))): trainer(tmp_path, **bad)
    assert not (tmp_path/'run').exists()


def test_an_unknown_setting_lists_the_known(tmp_path):
    with pytest.raises(TypeError, match='learning_rate.*batch_size'): trainer(tmp_path, learning_rate=1e-3)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    t = trainer(tmp_path)
    run = Run(t, tmp_path/'nan')

    def poison(e):
        if e['kind'] == 'step' and e['step'] == 3:
            with torch.no_grad(): next(iter(t.adapter.parameters())).fill_(math.nan)
    run.subscribe(poison)
    t._work(run)
    with pytest.raises(NonFiniteLoss, match=r'step 4; its samples are rows \['): run.wait(False)
    assert run.state == 'failed' and run.events[-1] == {**run.events[-1], 'kind': 'state', 'state': 'failed'}


def test_a_subscriber_or_probe_that_raises_does_not_end_the_run(tmp_path):
    t = trainer(tmp_path)
    run = Run(t, tmp_path/'r')
    run.subscribe(lambda e: 1/0)
    run.probe(lambda r: 1/0, every=0)
    t._work(run)
    assert run.state == 'finished' and sum(e['kind'] == 'warning' for e in run.events) == 2


def test_probes_run_in_the_worker_and_their_tensors_are_not_kept(tmp_path):
    seen, threads = [], set()

    def look(r):
        threads.add(threading.current_thread().name)
        return dict(kind='copy', A=next(iter(r.adapter.parameters())).detach().clone())
    t = trainer(tmp_path)
    run = Run(t, tmp_path/'r')
    run.probe(look, every=0)
    run.subscribe(lambda e: e['kind'] == 'copy' and seen.append(e))
    run._thread = threading.Thread(target=t._work, args=(run,), name='worker')
    run._thread.start()
    run.wait(False)
    assert threads == {'worker'} and len(seen) >= run.total_steps and not any(e['kind'] == 'copy' for e in run.events)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    run = t.fit()
    before = {p.name: p.read_bytes() for p in run.checkpoint.iterdir()}

    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('lora_nb.trainer.save_file', full)
    run.step += 1
    with pytest.raises(OSError): t._checkpoint(run)
    assert run.checkpoint.name == 'checkpoint-21' and len(checkpoints(run.out)) == 1
    assert {p.name: p.read_bytes() for p in run.checkpoint.iterdir()} == before
    assert not [p for p in run.out.iterdir() if p.name.startswith('.')]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    a, b = trainer(tmp_path, epochs=1).fit(), trainer(tmp_path, epochs=1, checkpointing=True).fit()
    assert a.log.loss.tolist() == pytest.approx(b.log.loss.tolist(), abs=1e-6)


def test_fp16_on_the_cpu_is_refused(tmp_path):
    model = tiny_llama().half()
    add_lora(model, r=4, alpha=8)
    with pytest.raises(ValueError, match='fp16'): Trainer(model, counting(), out=tmp_path/'x')


def test_bf16_trains(tmp_path):
    model = tiny_llama().bfloat16()
    add_lora(model, r=8, alpha=16)
    run = Trainer(model, counting(), out=tmp_path/'x', lr=1e-2, epochs=4).fit()
    assert run.log.loss.iloc[-1] < run.log.loss.iloc[0]*.85
    assert {p.dtype for p in run.adapter.parameters()} == {torch.float32}


def test_evaluation_is_the_token_mean_of_the_models_own_loss(tmp_path):
    t = trainer(tmp_path, batch_size=3)
    for i, s in enumerate(t.data.val): s.labels[:1+i] = [-100]*(1+i)
    t.model.eval()
    rows = [t.model(**collate([s])).loss.item()*s.n_labels for s in t.data.val]
    right = [int((t.model(**collate([s])).logits[0, :-1].argmax(-1) == torch.tensor(s.labels[1:])).sum()) for s in t.data.val]
    n, got = sum(s.n_labels for s in t.data.val), t.evaluate()
    assert got['loss'] == pytest.approx(sum(rows)/n, rel=1e-5) and got['accuracy'] == sum(right)/n
    t.fit()
    assert t.evaluate()['accuracy'] > got['accuracy']


def test_nothing_to_evaluate_is_told(tmp_path):
    with pytest.raises(ValueError, match='data.val is empty'): trainer(tmp_path).evaluate([])


def test_the_learning_rate_changes_while_it_runs(tmp_path):
    t = trainer(tmp_path, schedule='constant', warmup=0.)
    run = Run(t, tmp_path/'r')
    run.subscribe(lambda e: e['kind'] == 'step' and e['step'] == 5 and run.set_lr(1e-3))
    t._work(run)
    assert run.log.lr.tolist() == pytest.approx([1e-2]*5+[1e-3]*(run.total_steps-5))
    with pytest.raises(ValueError, match='lr=2'): run.set_lr(2)


def test_it_stops_early_and_keeps_the_best(tmp_path):
    from safetensors.torch import load_file
    t = trainer(tmp_path, schedule='constant', warmup=0., epochs=60, eval_every=2, patience=3, clip=0)
    run = Run(t, tmp_path/'r')
    run.subscribe(lambda e: e['kind'] == 'step' and e['step'] == 12 and run.set_lr(.5))
    t._work(run)
    losses = run.evals.loss.tolist()
    best = losses.index(min(losses))
    assert run.state == 'finished' and run.step < run.total_steps and best >= 6 and len(losses)-1-best == 3
    kept, = checkpoints(run.out, 'best')
    assert int(kept.name.split('-')[1]) == run.evals.step[best]
    t.adapter.load_state_dict({k.removeprefix('adapter::'): v for k, v in load_file(kept/'training.safetensors').items() if k.startswith('adapter::')})
    assert t.evaluate()['loss'] == pytest.approx(min(losses), abs=1e-6)


def test_old_checkpoints_are_pruned(tmp_path):
    run = trainer(tmp_path, save_every=3, keep=2).fit()
    assert sorted(p.name for p in run.out.glob('checkpoint-*')) == ['checkpoint-18', 'checkpoint-21'] and run.checkpoint.name == 'checkpoint-21'


def test_save_now_saves_at_the_next_step(tmp_path):
    t = trainer(tmp_path)
    run = Run(t, tmp_path/'r')
    run.subscribe(lambda e: e['kind'] == 'step' and e['step'] == 4 and run.save_now())
    t._work(run)
    assert [Path(e['path']).name for e in run.events if e['kind'] == 'checkpoint'] == ['checkpoint-4', 'checkpoint-21']


def test_a_paused_run_saves_when_asked(tmp_path):
    run = trainer(tmp_path, epochs=100).start()
    run.pause()
    until(lambda: run.state == 'paused')
    run.save_now()
    until(lambda: checkpoints(run.out))
    assert run.state == 'paused' and checkpoints(run.out)[0].name == f'checkpoint-{run.step}'
    run.stop()
    run.wait(False)


def test_a_runs_folder_resumes_from_its_newest_checkpoint(tmp_path):
    whole, model = trainer(tmp_path, save_every=3).fit(), tiny_llama()
    for p in checkpoints(whole.out)[-1:]: (p/'run.json').rename(tmp_path/'gone.json')
    add_lora(model, r=8, alpha=16)
    rest = Trainer.resume(whole.out, model, counting()).fit()
    assert rest.log.step.tolist() == [19, 20, 21] and rest.log.loss.tolist() == whole.log.loss.tolist()[18:]
    with pytest.raises(FileNotFoundError, match='nor does it hold one'): Trainer.resume(tmp_path, model, counting())


def test_tensorboard_has_the_runs_numbers(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = trainer(tmp_path).start()
    until(lambda: run.step > 2)
    folder = to_tensorboard(run)
    run.wait(False)
    seen = EventAccumulator(str(folder)).Reload()
    for tag, want in {'train/loss': run.log.loss, 'train/lr': run.log.lr, 'held-out/loss': run.evals.loss, 'held-out/accuracy': run.evals.accuracy}.items():
        got = seen.Scalars(tag)
        assert [e.value for e in got] == pytest.approx(want.tolist()) and len({e.step for e in got}) == len(got)


def test_out_of_memory_says_what_held_it_and_what_to_change(tmp_path, monkeypatch):
    t = trainer(tmp_path, save_every=2)
    whole = t._backward

    def full(batches, n):
        if run.step == 3: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return whole(batches, n)
    monkeypatch.setattr(t, '_backward', full)
    run = Run(t, tmp_path/'r')
    t._work(run)
    with pytest.raises(OutOfMemory, match=r'step 4, with batches of 8 samples of up to 12 tokens') as e: run.wait(False)
    for part in ('base weights', 'optimizer', 'batch_size=4, accum=2', 'checkpointing=True', 'paged_adamw8bit', 'checkpoint-3'): assert part in str(e.value)
    assert isinstance(e.value.__cause__, torch.OutOfMemoryError)


def test_free_answers_are_scored_by_the_users_function(tmp_path, smol):
    from lora_nb.data import chat_data
    from lora_nb.models import ask
    model, tok = smol
    asked = [f'What is {a} plus {a}?' for a in range(1, 7)]
    data = chat_data([dict(prompt=q, completion='Yes.') for q in asked], tok, val=.4)
    adapter, seen = add_lora(model, r=2, targets=['q_proj']), []
    try:
        run = Trainer(model, data, out=tmp_path/'r', epochs=1, batch_size=4, score=lambda answer, s: seen.append((s.row, answer)) or len(answer)).fit()
        assert [r for r, _ in seen] == [s.row for s in data.val]*len(run.evals)
        assert run.evals.score.iloc[0] == pytest.approx(sum(len(a) for _, a in seen[:len(data.val)])/len(data.val))
        table = score_answers(model, tok, data.val, lambda a, s: a == seen[-1][1])
        assert table.question.tolist() == [asked[s.row] for s in data.val] and table.answer.tolist() == ask(model, tok, table.question.tolist()) and table.score.iloc[-1] == 1
    finally: adapter.remove()
    prose = chat_data([dict(text='Some prose, and no chat.')]*4, tok, val=.5)
    with pytest.raises(ValueError, match='no chats'): score_answers(model, tok, prose.val, len)


def test_packed_training_learns_from_every_sample_once_an_epoch(tmp_path):
    model = tiny_llama()
    add_lora(model, r=8, alpha=16)
    data = counting()
    data.max_len = 48
    t = Trainer(model, data, out=tmp_path/'r', lr=1e-2, epochs=2, batch_size=2, packing=True)
    assert sorted(i for b in t._batches(1) for r in b for i in r) == list(range(len(data.train)))
    run = t.fit()
    assert run.total_steps == 2*math.ceil(14/2) and run.log.tokens.sum() == 2*sum(map(len, data.train)) and run.log.loss.iloc[-1] < run.log.loss.iloc[0]


def test_lora_plus_is_pefts(tmp_path):
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    t = trainer(tmp_path, lr_ratio=16., weight_decay=.1)
    peer = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=16, target_modules='all-linear'))
    opt = create_loraplus_optimizer(peer, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, loraplus_weight_decay=.1)
    count = lambda groups: {(round(g.get('initial_lr', g['lr']), 9), g['weight_decay']): sum(p.numel() for p in g['params']) for g in groups if g['params']}
    assert count(t.optimizer.param_groups) == count(opt.param_groups)


def test_vectors_are_not_decayed(tmp_path):
    model = tiny_llama()
    add_lora(model, r=4, alpha=8, dora=True)
    t = Trainer(model, counting(), out=tmp_path/'r', weight_decay=.1)
    decays = {p.ndim: g['weight_decay'] for g in t.optimizer.param_groups for p in g['params']}
    assert decays == {1: 0., 2: .1}


@pytest.mark.parametrize('optimizer', ['adamw', 'adamw8bit'])
def test_eight_bit_adamw_works_on_the_cpu_too(tmp_path, optimizer):
    run = trainer(tmp_path, optimizer=optimizer, epochs=4).fit()
    assert run.log.loss.iloc[-1] < run.log.loss.iloc[0]*.85


def test_paged_adamw_is_refused_on_the_cpu(tmp_path):
    with pytest.raises(ValueError, match='paged_adamw8bit'): trainer(tmp_path, optimizer='paged_adamw8bit')


def test_neftune_trains_and_comes_off(tmp_path):
    t = trainer(tmp_path, neftune=5.)
    ids = torch.arange(6)[None]
    clean = t.model.get_input_embeddings()(ids).clone()
    a, b = t.fit(), trainer(tmp_path).fit()
    assert a.log.loss.tolist() != b.log.loss.tolist()
    assert torch.equal(t.model.train().get_input_embeddings()(ids), clean)


def test_fifty_steps_are_those_of_transformers_trainer_with_peft(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import Trainer as HFTrainer, TrainingArguments
    t = trainer(tmp_path, epochs=8, schedule='linear', batch_size=4, accum=2)
    peer = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=16, target_modules='all-linear'))
    set_peft_model_state_dict(peer, {k: v.clone() for k, v in t.adapter.state_dict().items()})
    order = [i for epoch in range(8) for b in t._batches(epoch) for i in b]
    rows = Dataset.from_list([dict(input_ids=t.data.train[i].input_ids, labels=t.data.train[i].labels) for i in order])
    args = TrainingArguments(output_dir=str(tmp_path/'hf'), per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2, warmup_steps=round(.05*56),
                             lr_scheduler_type='linear', num_train_epochs=1, logging_steps=1, report_to=[], use_cpu=True, save_strategy='no', max_grad_norm=1., disable_tqdm=True)

    class InOrder(HFTrainer):
        def _get_train_sampler(self, *a, **k): return torch.utils.data.SequentialSampler(rows)
    from transformers import default_data_collator
    peer_trainer = InOrder(model=peer, args=args, train_dataset=rows, data_collator=default_data_collator)
    peer_trainer.train()
    theirs = [h['loss'] for h in peer_trainer.state.log_history if 'loss' in h]
    ours = t.fit().log.loss.tolist()
    assert len(ours) == len(theirs) == 56
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='counts threads by /proc')
def test_a_run_lets_the_helpers_of_the_first_thread_go(tmp_path, llama):
    if not release_threads(): pytest.skip('this OpenMP cannot')
    helpers = lambda: len(os.listdir('/proc/self/task'))-threading.active_count()
    was = torch.get_num_threads()
    torch.set_num_threads(2)
    train = lambda: Trainer(llama, counting(), out=tmp_path/'run', epochs=1).start().wait(False)
    try:
        add_lora(llama, r=2)
        train()                                         # autograd's own threads stay from here on
        time.sleep(.5)
        torch.ones(10**6).add_(1)
        awake = helpers()
        train()
        end = time.monotonic()+10
        while helpers() != awake-1 and time.monotonic() < end: time.sleep(.05)      # the worker's thread has still to end
        assert helpers() == awake-1
        torch.ones(10**6).add_(1)                       # and they come back when they are needed
        assert helpers() == awake
    finally: torch.set_num_threads(was)
