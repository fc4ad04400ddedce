"""`python -m torch_bridge.benchmark --training-step`: one training whatever forms the loss, and what is seen of it."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from torch_bridge.benchmark import __main__ as benchmark
from torch_bridge.benchmark import training_step
from torch_bridge.benchmark.measurements import Result
from torch_bridge.benchmark.training_step import TINY, Training, hidden_states, loss_of, make_data, make_parameters

DENSE = "JAX dense, exact logits"


def test_a_run_at_a_small_size_gives_times_and_memory(tmp_path, capsys):
    (tmp_path / "benchmark.json").write_text('{"device": "kept"}')
    arguments = ["--training-step", "--device", "cpu", "--repeats", "1", "--rows", "32", "--out", str(tmp_path)]
    assert benchmark.main([*arguments, "--only", "jaxkd", "no loss"]) == 0
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["device"] == "kept"
    found = content["training_step"]
    assert (found["device"], found["attention"]) == ("cpu", "xla")
    assert found["model"]["vocabulary"] == TINY.vocabulary
    bare, ours = found["results"]
    assert [(r["task"], r["contender"]) for r in (bare, ours)] == [("32 tokens", "no loss"), ("32 tokens", "jaxkd")]
    assert ours["temporary"] > bare["temporary"] > 0
    assert ours["tokens_per_second"] == pytest.approx(32 / ours["median"], rel=1e-3)
    assert "32 tokens" in capsys.readouterr().out


def test_tokens_come_in_whole_sequences(capsys):
    assert benchmark.main(["--training-step", "--device", "cpu", "--rows", "24"]) == 2
    assert "--rows 24: tokens come in sequences of 16" in capsys.readouterr().err


def test_a_step_moves_the_parameters_as_the_dense_loss_does():
    parameters = make_parameters(TINY, jax.random.key(0))
    data = make_data(TINY, 32, jax.random.key(1))
    both = jax.jit(
        lambda parameters: {
            name: jax.value_and_grad(partial(loss_of, name, TINY, "xla"))(parameters, data) for name in ("jaxkd", DENSE)
        }
    )(parameters)
    (loss, gradients), (exact, exact_gradients) = both["jaxkd"], both[DENSE]
    assert 0 < loss < np.log(2)
    np.testing.assert_allclose(loss, exact, rtol=1e-4)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact_gradients), strict=True):
        ours, theirs = np.float32(ours), np.float32(theirs)
        assert np.linalg.norm(theirs) > 0
        assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)  # bfloat16 through all layers


def test_no_token_sees_a_later_one():
    parameters = make_parameters(TINY, jax.random.key(0))
    tokens = make_data(TINY, 16, jax.random.key(1)).tokens
    states = jax.jit(partial(hidden_states, TINY, "xla"))
    before, after = (np.float32(states(parameters, x)) for x in (tokens, tokens.at[0, 9].add(1)))
    assert before.shape == (1, 16, TINY.width)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all()


def test_training_goes_on_after_a_step_that_failed():
    training = Training.__new__(Training)
    training.start = lambda: "fresh"
    training.state = "old"

    def failing(state, data):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        training.run(failing, None)
    assert training.state == "fresh"
    assert training.run(lambda state, data: (state + "er", jnp.float32(1)), None) == 1
    assert training.state == "fresher"


def test_the_table_says_what_ran_out_of_memory(capsys):
    results = [
        Result("1000 tokens", "no loss", [0.5], memory=2**30),
        Result("1000 tokens", "dense", memory=3 * 2**30, failure="out of memory"),
    ]
    benchmark.Console(width=200).print(training_step.training_table("title", results))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "1000 tokens no loss 500.0 500.0 to 500.0 2,000 1.00 1.00" in lines
    assert "1000 tokens dense 3.00 out of memory" in lines
