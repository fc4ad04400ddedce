"""A teacher's hidden states on disk: exact, the same bytes after a kill, refused when damaged or another's."""

import copy
import json
import multiprocessing
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from smollm2_cases import TEXT, save_tiny_teacher, tiny_llama

import jaxkd
from torch_bridge import CacheError, LiveTeacher, cache_teacher, open_teacher_cache
from torch_bridge.teachers import teacher_cache

TEXTS = [TEXT[start : start + 10 + 7 * (start % 5)] for start in range(0, 330, 33)]  # of many lengths
BATCHES = 5  # of two texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_tiny_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory):
    """A cache that nothing disturbed."""
    folder = tmp_path_factory.mktemp("cache") / "of" / "tiny"
    cache_teacher(tiny_llama(), TEXTS, folder, tokenizer=tokenizer, batch_size=2)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_hidden_states_are_the_live_teachers(tokenizer, tmp_path, dtype):
    model = tiny_llama()
    cache = cache_teacher(model, TEXTS, tmp_path, tokenizer=tokenizer, dtype=dtype, batch_size=3)
    live = LiveTeacher(model)
    assert len(cache) == len(TEXTS)
    for text, batch in zip(TEXTS, cache.batches([i] for i in range(len(TEXTS))), strict=True):
        ids = np.array(tokenizer(text)["input_ids"])
        length = len(ids) - 1
        np.testing.assert_array_equal(batch.tokens[0, :length], ids[:-1])
        np.testing.assert_array_equal(batch.labels[0, :length], ids[1:])
        assert (batch.labels[0, length:] == -100).all()
        assert batch.tokens.shape == (1, cache.length)
        expected = live(ids[None, :-1]).hidden
        assert batch.teacher.hidden.dtype == jnp.dtype(dtype)
        tolerance = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-5}[dtype]
        np.testing.assert_allclose(batch.teacher.hidden[0, :length], expected[0], rtol=tolerance, atol=1e-5)
        np.testing.assert_array_equal(batch.teacher.weight, live.head["weight"])


def test_a_bfloat16_model_is_kept_exactly(tokenizer, tmp_path):
    model = tiny_llama().bfloat16()
    windows = np.random.default_rng(0).integers(0, 300, (6, 9))
    batch = cache_teacher(model, windows, tmp_path, tokenizer=tokenizer, batch_size=6).batch(np.arange(6))
    live = LiveTeacher(model)(windows[:, :-1])
    np.testing.assert_array_equal(np.asarray(batch.teacher.hidden), np.asarray(live.hidden))
    assert batch.teacher.weight.dtype == jnp.bfloat16


def test_size_is_that_of_the_hidden_states_and_one_head(finished):
    positions = sum(np.fromfile(finished / "lengths", np.int64))
    assert (finished / "hidden").stat().st_size == positions * 32 * 2
    assert (finished / "weight").stat().st_size == 300 * 32 * 4


def test_bias_scale_and_softcap_are_kept(tokenizer, tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    phi = PhiForCausalLM(PhiConfig(**sizes)).eval()
    torch.nn.init.normal_(phi.lm_head.bias)
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=15.0)).eval()
    for part, model in (("bias", phi), ("softcap", gemma)):
        teacher = cache_teacher(model, TEXTS, tmp_path / part, tokenizer=tokenizer).batch([0]).teacher
        expected = LiveTeacher(model).head
        assert {key for key, value in expected.items() if value is not None} == {"weight", part}
        for key, value in expected.items():
            assert (getattr(teacher, key) is None) == (value is None)
            np.testing.assert_array_equal(getattr(teacher, key), value)


def test_max_length_cuts(tokenizer, tmp_path):
    cache = cache_teacher(tiny_llama(), TEXTS, tmp_path, tokenizer=tokenizer, max_length=5)
    assert cache.length == 4
    assert cache.batch([0, 1]).teacher.hidden.shape == (2, 4, 32)


def test_token_ids_need_no_tokenizer(tokenizer, tmp_path):
    cache_teacher(tiny_llama(), [[1, 2, 3]], tmp_path, tokenizer=None)
    with pytest.raises(CacheError, match="of token ids without a tokenizer, and one is given"):
        open_teacher_cache(tmp_path, tokenizer)


def test_a_step_is_compiled_once_and_sees_no_padding(finished):
    cache = open_teacher_cache(finished)
    traces = []

    @jax.jit
    def loss_of(batch):
        traces.append(batch)
        student = jaxkd.LinearLogits(jnp.ones((*batch.tokens.shape, 4)), jnp.zeros((300, 4)))
        loss, metrics = jaxkd.distillation_loss(student, batch.teacher, batch.labels)
        return loss, metrics["num_rows"]

    lengths = np.fromfile(finished / "lengths", np.int64)
    order = np.random.default_rng(0).permutation(10).reshape(5, 2)
    for indices, batch in zip(order, cache.batches(order), strict=True):
        loss, num_rows = loss_of(batch)
        assert np.isfinite(loss)
        assert num_rows == lengths[indices].sum()
    assert len(traces) == 1


def test_batches_come_in_order_ahead_of_their_use(finished):
    asked = []

    def indices():
        for i in range(8):
            asked.append(i)
            yield [i]

    cache = open_teacher_cache(finished)
    for count, (batch, expected) in enumerate(
        zip(cache.batches(indices(), prefetch=2), cache.batches(([i] for i in range(8)), prefetch=0), strict=True)
    ):
        assert len(asked) == min(count + 3, 8)
        np.testing.assert_array_equal(batch.tokens, expected.tokens)


def test_an_error_in_the_thread_reaches_the_loop(finished):
    with pytest.raises(IndexError, match=r"has 10 to 10, but the cache has 10 texts"):
        list(open_teacher_cache(finished).batches([[0], [10]]))


def test_a_loop_may_stop_early(finished):
    batches = open_teacher_cache(finished).batches([i % 10] for i in range(10**9))
    next(batches)
    batches.close()


# Killed writers. ---------------------------------------------------------------------------------------------------


def write_until(point, folder, tokenizer):
    """Runs in a process of its own: a writer that kills itself at ``point``."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def progress(batches):
        for batch in batches:
            if point == f"before batch {batch}":
                die()
            if point == f"within batch {batch}":
                with (folder / "hidden").open("ab") as file:
                    file.write(b"half of a batch")
                die()
            yield batch

    replace = os.replace

    def replace_or_die(source, target):
        if point == f"before {target.name}":
            die()
        replace(source, target)

    os.replace = replace_or_die
    cache_teacher(tiny_llama(), TEXTS, folder, tokenizer=tokenizer, batch_size=2, progress=progress)


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.llama.modeling_llama", "torch_bridge", "smollm2_cases"])
    return context


def killed_writer(processes, point, folder, tokenizer):
    process = processes.Process(target=write_until, args=(point, folder, tokenizer))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("point", "unfinished"),
    [
        ("before header.json", "there is no teacher cache"),
        ("before batch 0", "`hidden` has 0 of"),
        ("within batch 3", r"`hidden` has \d+ of"),
        ("before sha256.json", "its seal sha256.json is missing"),
    ],
)
def test_a_killed_writer_goes_on_to_the_same_bytes(finished, tokenizer, processes, tmp_path, point, unfinished):
    folder = tmp_path / "cache"
    killed_writer(processes, point, folder, tokenizer)
    with pytest.raises(CacheError, match=unfinished):
        open_teacher_cache(folder)
    if point == "within batch 3":  # and killed once more
        killed_writer(processes, "before batch 4", folder, tokenizer)
    done = []

    def progress(batches):
        done.extend(batches)
        return batches

    cache_teacher(tiny_llama(), TEXTS, folder, tokenizer=tokenizer, batch_size=2, progress=progress)
    first = {"within batch 3": 4, "before sha256.json": BATCHES}.get(point, 0)
    assert done == list(range(first, BATCHES))
    assert contents(folder) == contents(finished)


def test_a_writer_killed_at_any_moment(finished, tokenizer, processes, tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(6):
        process = processes.Process(target=write_until, args=("never", tmp_path, tokenizer))
        process.start()
        process.join(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    cache_teacher(tiny_llama(), TEXTS, tmp_path, tokenizer=tokenizer, batch_size=2)
    assert contents(tmp_path) == contents(finished)


def test_two_writers_wait_for_each_other(finished, tokenizer, processes, tmp_path):
    process = processes.Process(target=write_until, args=("never", tmp_path, tokenizer))
    process.start()
    while not (tmp_path / "lock").exists():
        assert process.is_alive()
    cache_teacher(tiny_llama(), TEXTS, tmp_path, tokenizer=tokenizer, batch_size=2)
    process.join()
    assert process.exitcode == 0
    assert contents(tmp_path) == contents(finished)


# What is refused. --------------------------------------------------------------------------------------------------


def other_tokenizer(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<another>"])
    return other


def other_model():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    return model


def test_calls_on_the_tokenizer_do_not_change_its_fingerprint(finished, tokenizer):
    tokenizer(TEXTS, padding=False, truncation=True, max_length=3)
    open_teacher_cache(finished, tokenizer, model=tiny_llama(), texts=TEXTS, verify=True)


def test_cache_of_another_is_refused(finished, tokenizer):
    changed = [*TEXTS[:7], "another", *TEXTS[8:]]
    for arguments, message in (
        ({"tokenizer": other_tokenizer(tokenizer)}, "its tokenizer has another vocabulary, .* than the one given"),
        ({"model": other_model()}, "its model has other weights or another configuration than the one given"),
        ({"texts": changed}, r"1 of 10 texts differ, texts\[7\] the first"),
        ({"texts": TEXTS[:9]}, "texts were 10, now 9"),
    ):
        with pytest.raises(CacheError, match=rf"another teacher's cache: {message}\. Give what it was made from"):
            open_teacher_cache(finished, **arguments)


def test_the_name_of_a_tokenizer_is_none(finished, tmp_path):
    message = r"`tokenizer` is 'gpt2', a string; give a tokenizer: .*AutoTokenizer\.from_pretrained\('gpt2'\)"
    with pytest.raises(TypeError, match=message):
        open_teacher_cache(finished, "gpt2")
    with pytest.raises(TypeError, match=message):
        cache_teacher(tiny_llama(), TEXTS, tmp_path / "cache", tokenizer="gpt2")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": other_model}, "its model has other weights"),
        ({"texts": TEXTS[::-1]}, r": 10 of 10 texts differ, texts\[0\] the first\."),
        ({"dtype": "float32"}, r": dtype was 'bfloat16', now 'float32'\."),
        ({"batch_size": 4, "max_length": 6}, r": batch_size was 2, now 4; max_length was None, now 6\."),
    ],
)
def test_a_writer_leaves_anothers_cache_alone(finished, tokenizer, changed, message):
    before = contents(finished)
    arguments = {"model": tiny_llama, "texts": TEXTS, "batch_size": 2, **changed}
    with pytest.raises(CacheError, match=message):
        cache_teacher(arguments.pop("model")(), out=finished, tokenizer=tokenizer, **arguments)
    assert contents(finished) == before


@pytest.mark.parametrize("name", ["hidden", "tokens", "lengths", "text_hashes", "weight"])
def test_damage_is_noticed(copied, name):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[:-3])
    size = len(content)
    with pytest.raises(CacheError, match=rf"`{name}` has {size - 3} bytes, but its header says {size}, for"):
        open_teacher_cache(copied)
    (copied / name).write_bytes(content + b"!")
    with pytest.raises(CacheError, match=rf"`{name}` has {size + 1} bytes, but its header says {size}"):
        open_teacher_cache(copied)
    (copied / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CacheError, match=rf"`{name}` has SHA-256"):
        open_teacher_cache(copied, verify=True)


def test_damaged_header_is_noticed(copied):
    with pytest.raises(CacheError, match=r"there is no teacher cache in .*write one with cache_teacher"):
        open_teacher_cache(copied / "elsewhere")
    header = json.loads((copied / "header.json").read_text())
    (copied / "header.json").write_text(json.dumps(header | {"format": 2}))
    with pytest.raises(CacheError, match=r"format was 2, now 1"):
        open_teacher_cache(copied)
    (copied / "header.json").write_text(json.dumps(header)[:50])
    with pytest.raises(CacheError, match=r"header\.json is damaged"):
        open_teacher_cache(copied)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "int8"}, ValueError, r"`dtype` is 'int8'; give one of bfloat16"),
        ({"batch_size": 0}, ValueError, r"`batch_size` is 0; give an integer of at least 1"),
        ({"batch_size": None}, ValueError, r"`batch_size` is None; give an integer of at least 1"),
        ({"max_length": 1}, ValueError, r"`max_length` is 1; give an integer of at least 2"),
        ({"texts": "one string"}, TypeError, r"`texts` is 'one string'; give strings"),
        ({"texts": []}, TypeError, r"`texts` is \[\]; give strings"),
        ({"texts": ["two", 3]}, TypeError, r"`texts\[1\]` is 3; give all strings"),
        ({"texts": ["a word", ""]}, ValueError, r"`texts\[1\]` has 0 tokens; a text needs 2"),
        ({"texts": [[1, 2], [3, 300]]}, ValueError, r"`texts\[1\]` has token 300, but the model knows 0 to 299"),
        ({"texts": [[1, 2], [3, -1]]}, ValueError, r"`texts\[1\]` has token -1"),
        (
            {"texts": np.zeros((1, 2050), int)},
            ValueError,
            r"but the model reads 2048: give max_length=2049",
        ),
        ({"tokenizer": None}, TypeError, r"`tokenizer` is None, but `texts` are strings; give the teacher's"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tokenizer, tmp_path, arguments, error, message):
    arguments = {"texts": TEXTS, "tokenizer": tokenizer, **arguments}
    with pytest.raises(error, match=message):
        cache_teacher(tiny_llama(), arguments.pop("texts"), tmp_path / "cache", **arguments)
    assert not (tmp_path / "cache").exists()


def test_bad_indices(finished):
    cache = open_teacher_cache(finished)
    with pytest.raises(TypeError, match=r"`indices` is float64 of shape \(1,\); give integers of shape \(B,\)"):
        cache.batch([0.5])
    with pytest.raises(TypeError, match=r"`indices` is int64 of shape \(\)"):
        cache.batch(3)
    with pytest.raises(IndexError, match=r"-1 to -1"):
        cache.batch([-1])
    with pytest.raises(ValueError, match=r"`prefetch` is -1; give an integer of at least 0"):
        cache.batches([[0]], prefetch=-1)


def test_hidden_states_are_read_as_whole_numbers(finished):
    """bfloat16 would hold the interpreter's lock while the disk is read."""
    cache = open_teacher_cache(finished)
    assert cache._hidden.dtype == np.uint16
    assert isinstance(cache._hidden, np.memmap)
    assert teacher_cache.DTYPES[0] == cache.header["dtype"]
