import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.policy.options import LoraOptions, OptimizerOptions, PolicyOptions
from appo_lightning.rollout.formats.tags import TagFormat
from appo_lightning.rollout.imitation import NOT_TRAINED, TokenRow, encode_demonstration
from appo_lightning.sft import DemonstrationDataModule, SFTModule, collate
from appo_lightning.tasks.demonstrations import LABELS, Demonstration, JSONLDemonstrations, Segment
from appo_lightning.tasks.lookup import LookupDemonstrations, create_tiny_policy
from appo_lightning.tasks.lookup.tokenizer import build_tokenizer
from appo_lightning.tools.search import SearchTool

TOKENIZER = build_tokenizer()
TAGS = TagFormat().bind(TOKENIZER, [])


@pytest.fixture(autouse=True)
def _one_thread():
    # Tensors are tiny: threads would only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(create_tiny_policy(tmp_path_factory.mktemp("tiny"), hidden_size=32, num_layers=1))


class Losses(L.Callback):
    """Remembers the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, *args) -> None:
        self.values.append(float(trainer.callback_metrics["sft/loss"]))


def make_module(path: str, *, lora: bool = False, micro_batch_tokens: int = 16384) -> SFTModule:
    return SFTModule(
        PolicyOptions(path, lora=LoraOptions(rank=4) if lora else None),
        OptimizerOptions(learning_rate=1e-2),
        micro_batch_tokens,
    )


def make_data(**options) -> DemonstrationDataModule:
    options = {"batch_size": 8, "steps": 10, **options}
    return DemonstrationDataModule(LookupDemonstrations(size=200), **options)


def fit(module, data, folder: Path, *, callbacks=(), ckpt_path=None, **options) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


# --- tokens and labels -------------------------------------------------------------------------------------------


def test_labels_align_with_tokens():
    source = LookupDemonstrations(hops=[1, 1, 1, 1, 1])
    for i in range(100):
        demonstration = source.demonstration(i)
        row = encode_demonstration(demonstration, TOKENIZER, TAGS, max_length=4096)
        expected = [
            (token, segment.label)
            for segment in demonstration.segments
            for token in TOKENIZER.encode(segment.text, add_special_tokens=False)
        ]
        prompt = len(row.token_ids) - len(expected) - 1
        found = [
            (token, "tool" if label == NOT_TRAINED else LABELS[label])
            for token, label in zip(row.token_ids[prompt:], row.labels[prompt:], strict=True)
        ]
        assert found == [*expected, (TOKENIZER.eos_token_id, "format")]
        assert row.labels[:prompt] == [NOT_TRAINED] * prompt


def test_tool_results_and_the_prompt_are_not_trained_on():
    demonstration = Demonstration(
        [{"role": "user", "content": "a"}], [Segment("<say>b</say>", "text"), Segment("<result>c</result>", "tool")]
    )
    row = encode_demonstration(demonstration, TOKENIZER, TAGS, max_length=100)
    trained = [i for i, label in zip(row.token_ids, row.labels, strict=True) if label != NOT_TRAINED]
    assert TOKENIZER.decode(trained) == "<say>b</say><|im_end|>"
    assert TOKENIZER.decode(row.token_ids).endswith("assistant\n<say>b</say><result>c</result><|im_end|>")


def test_a_token_across_two_pieces_takes_the_label_of_its_beginning():
    # " Bako" is one token of the world.
    pieces = [Segment(" Ba", "decision"), Segment("ko", "format")]
    row = encode_demonstration(
        Demonstration([{"role": "user", "content": "a"}], pieces), TOKENIZER, TAGS, max_length=100
    )
    assert [LABELS[label] for label in row.labels if label != NOT_TRAINED] == ["decision", "format"]


def test_long_demonstrations_are_cut():
    demonstration = LookupDemonstrations().demonstration(0)
    whole = encode_demonstration(demonstration, TOKENIZER, TAGS, max_length=4096)
    cut = encode_demonstration(demonstration, TOKENIZER, TAGS, max_length=40)
    assert (cut.token_ids, cut.labels, cut.was_cut) == (whole.token_ids[:40], whole.labels[:40], True)
    assert not whole.was_cut


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(DataError, match=r"prompt has \d+ tokens, data.max_length is 10"):
        encode_demonstration(LookupDemonstrations().demonstration(0), TOKENIZER, TAGS, max_length=10)


def test_rows_are_padded_on_the_right():
    rows = collate([TokenRow([5, 6, 7], [-1, 0, 1]), TokenRow([8, 9], [-1, 2])])
    assert rows.token_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert rows.lengths.tolist() == [3, 2]
    assert rows.trained.tolist() == [[False, True, True], [False, True, False]]
    assert rows.rows(torch.tensor([1])).token_ids.tolist() == [[8, 9]]


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.fixture
def attached(tiny, tmp_path):
    """Makes a data module whose trainer holds a policy, after no step at all."""

    def attach(**options) -> DemonstrationDataModule:
        data = make_data(**options)
        fit(make_module(tiny), data, tmp_path, max_epochs=1, limit_train_batches=1)
        return data

    return attach


def test_batches_are_a_function_of_seed_and_number(attached):
    one, two, other = attached(), attached(), attached(seed=1)
    assert torch.equal(one.batch(3).token_ids, two.batch(3).token_ids)
    assert one.batch(3).token_ids.shape != other.batch(3).token_ids.shape or not torch.equal(
        one.batch(3).token_ids, other.batch(3).token_ids
    )


def test_an_epoch_visits_every_demonstration_once(attached):
    data = attached(steps=None)
    assert data.steps == 25  # 200 demonstrations in batches of 8
    questions = [TOKENIZER.decode(row) for n in range(25) for row in data.batch(n).token_ids]
    assert len(set(questions)) == 200


def test_processes_share_a_batch(attached):
    data = attached()
    whole, halves = data.batch(2), [data.batch(2, rank, 2) for rank in (0, 1)]
    texts = [[TOKENIZER.decode(row[:n]) for row, n in zip(b.token_ids, b.lengths, strict=True)] for b in halves]
    together = [text for pair in zip(*texts, strict=True) for text in pair]
    assert together == [TOKENIZER.decode(row[:n]) for row, n in zip(whole.token_ids, whole.lengths, strict=True)]


def test_copy_warmup_repeats_strings_and_trains_on_the_second_half(attached):
    data = attached(copy_warmup_steps=2, copy_length=5)
    for number in (0, 1):
        batch = data.batch(number)
        assert torch.equal(batch.token_ids[:, :5], batch.token_ids[:, 5:])
        assert batch.trained.tolist() == [[False] * 5 + [True] * 5] * 8
    assert torch.equal(data.batch(2).token_ids, attached().batch(0).token_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1"),
        ({"steps": 5, "copy_warmup_steps": 5}, "data.steps must be more than the 5 copy_warmup_steps"),
        ({"max_length": 1}, "data.max_length must be at least 2"),
        ({"tools": [SearchTool(), SearchTool()]}, "the names of tools must differ, got search, search"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        make_data(**options)


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_thirty_steps_lower_the_loss(tiny, tmp_path, lora):
    losses = Losses()
    fit(make_module(tiny, lora=lora), make_data(steps=30), tmp_path, callbacks=[losses], max_epochs=1)
    assert len(losses.values) == 30
    # Adapters leave the random embeddings as they are: there is little that they can learn.
    assert losses.values[-1] < losses.values[0] - (0.01 if lora else 2.0)


def test_the_loss_is_a_mean_over_tokens_whatever_the_micro_batches(tiny, tmp_path):
    weights, losses = [], []
    for tokens in (16384, 150):
        module, record = make_module(tiny, micro_batch_tokens=tokens), Losses()
        fit(module, make_data(), tmp_path, callbacks=[record], max_epochs=1, limit_train_batches=3)
        weights.append(torch.cat([parameter.flatten() for parameter in module.policy.parameters()]))
        losses.append(record.values)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=0)


def test_the_first_loss_equals_the_likelihood_by_hand(tiny, tmp_path):
    record, data = Losses(), make_data()
    module = make_module(tiny)
    fit(module, data, tmp_path, callbacks=[record], max_epochs=1, limit_train_batches=1)
    fresh = make_module(tiny)
    fresh.configure_model()
    batch = data.batch(0)
    total, count = 0.0, 0
    for row, length, trained in zip(batch.token_ids, batch.lengths, batch.trained, strict=True):
        ids = row[: int(length)]
        with torch.no_grad():
            logprobs = fresh.policy.model(input_ids=ids[None]).logits[0].log_softmax(-1)
        for t in range(1, int(length)):
            if trained[t]:
                total, count = total - float(logprobs[t - 1, ids[t]]), count + 1
    assert record.values[0] == pytest.approx(total / count, abs=1e-4)


@pytest.mark.parametrize("stop_after", [4, 10], ids=["inside an epoch", "between epochs"])
def test_a_resumed_run_repeats_the_losses_of_an_unbroken_one(tiny, tmp_path, stop_after):
    unbroken = Losses()
    fit(make_module(tiny), make_data(), tmp_path, callbacks=[unbroken], max_epochs=-1, max_steps=14)

    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=stop_after, save_top_k=-1)
    fit(make_module(tiny), make_data(), tmp_path, callbacks=[saver], max_epochs=-1, max_steps=14)
    resumed = Losses()
    fit(
        make_module(tiny),
        make_data(),
        tmp_path,
        callbacks=[resumed],
        max_epochs=-1,
        max_steps=14,
        ckpt_path=tmp_path / "saved" / f"step={stop_after}.ckpt",
    )
    assert resumed.values == unbroken.values[stop_after:]


def test_your_own_demonstrations_train_too(tiny, tmp_path):
    path = tmp_path / "mine.jsonl"
    row = {"messages": [{"role": "user", "content": "2 + 3?"}], "response": "<think> add</think><answer>5</answer>"}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    losses = Losses()
    data = DemonstrationDataModule(JSONLDemonstrations(str(path)), batch_size=2, steps=10)
    fit(make_module(tiny), data, tmp_path, callbacks=[losses], max_epochs=1)
    assert losses.values[-1] < losses.values[0]
