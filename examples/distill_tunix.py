"""tunix's own trainers of distillation, fine-tuning and DPO: with their dense losses, and with jaxkd's.

    pip install -e '.[tunix]' && python -m examples.distill_tunix --trainers sft distillation dpo

Student and teacher are tunix's Qwen3 with tied heads, on a mesh of tunix's axes "fsdp" and "tp"; distillation and DPO
train LoRA on the student's body. Without GPUs there are eight virtual CPU devices.
"""

import argparse
import dataclasses
import math
import os
from typing import Any, ClassVar

if not os.path.exists("/dev/nvidia0"):  # before JAX starts
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # tunix constrains no activations on a CPU, which XLA warns of

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from jax.sharding import AxisType, Mesh
from tunix.distillation import strategies
from tunix.distillation.distillation_trainer import DistillationTrainer
from tunix.distillation.distillation_trainer import TrainingConfig as DistillationConfig
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.rl import reshard
from tunix.sft import peft_trainer, sharding_utils, utils
from tunix.sft.dpo import dpo_trainer

import jaxkd
from examples.words import random_windows, read_words

TEMPERATURE, ALPHA, BETA = 2.0, 0.5, 0.1
LORA_ON = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
TINY = {"num_heads": 4, "head_dim": 16, "num_kv_heads": 2, "rope_theta": 10_000, "norm_eps": 1e-6, "vocab_size": 4096}
TINY_STUDENT = qwen3.ModelConfig(num_layers=1, embed_dim=64, hidden_dim=128, use_tied_embedding=True, **TINY)
TINY_TEACHER = qwen3.ModelConfig(num_layers=2, embed_dim=128, hidden_dim=256, use_tied_embedding=True, **TINY)

# What the losses take of a model --------------------------------------------------------------------------------------


def linear_logits(model: Any, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> jaxkd.LinearLogits:
    """The logits of any tunix model that sows its hidden states, not formed.

    The model is called as a whole, because qwix puts LoRA into its ``__call__`` and not into its layers. Nobody uses
    the logits that come of it, so under `jit` they are not computed.
    """
    model(tokens, positions, None, mask, output_hidden_states=True)
    hidden = nnx.pop(model, nnx.Intermediate)["all_hidden_states"][-1]
    head = model.lm_head.w[...].T if hasattr(model, "lm_head") else model.embedder.input_embedding[...]  # (V, D)
    softcap = getattr(model.config, "final_logit_softcap", None)  # Gemma 2
    return jaxkd.LinearLogits(hidden, head, softcap=softcap)


def positions_and_mask(input_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    return utils.build_positions_from_mask(input_mask), utils.make_causal_attn_mask(input_mask)


# Distillation ---------------------------------------------------------------------------------------------------------


class FusedLogitStrategy(strategies.BaseStrategy):
    """tunix's `LogitStrategy` whose models give `LinearLogits` and whose labels are tokens."""

    def __init__(self, temperature: float, alpha: float, **options: Any):
        def forward(model, input_tokens, input_mask):
            return linear_logits(model, input_tokens, *positions_and_mask(input_mask))

        super().__init__(
            forward, forward, lambda input_tokens, input_mask: jaxkd.shift_labels(input_tokens, input_mask)
        )
        self.weights: dict[str, Any] = {
            "temperature": temperature,
            "soft_weight": alpha * temperature**2,
            "hard_weight": 1 - alpha,
        }
        self.options = options

    def compute_loss(self, student_output, teacher_output, labels):
        return jaxkd.distillation_loss(student_output, teacher_output, labels, **self.weights, **self.options)

    def compute_eval_loss(self, student_output, labels):
        return jaxkd.cross_entropy(student_output, labels, **self.options)


def dense_strategy(vocabulary: int) -> strategies.LogitStrategy:
    def forward(model, input_tokens, input_mask):
        positions, mask = positions_and_mask(input_mask)
        return model(input_tokens, positions, None, mask)[0][:, :-1]

    def labels(input_tokens, input_mask):
        return jax.nn.one_hot(input_tokens[:, 1:], vocabulary) * input_mask[:, 1:, None]

    return strategies.LogitStrategy(forward, forward, labels, TEMPERATURE, ALPHA)


def distillation_trainer(student, teacher, optimizer, sharding: jaxkd.Sharding | None) -> DistillationTrainer:
    """Without a `Sharding` this trainer, and each one below, is tunix's own."""
    if sharding is None:
        strategy = dense_strategy(student.config.vocab_size)
    else:
        strategy = FusedLogitStrategy(TEMPERATURE, ALPHA, sharding=sharding)
    return DistillationTrainer(student, teacher, strategy, optimizer, DistillationConfig(eval_every_n_steps=1000))


# Fine-tuning ----------------------------------------------------------------------------------------------------------


def sft_trainer(model, _, optimizer, sharding: jaxkd.Sharding | None) -> peft_trainer.PeftTrainer:
    trainer = peft_trainer.PeftTrainer(model, optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=1000))

    def inputs(batch):
        positions, mask = positions_and_mask(batch.input_mask)
        tokens = {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask}
        return {**tokens, "positions": positions, "attention_mask": mask}

    def loss(model, input_tokens, input_mask, positions, attention_mask):
        logits = linear_logits(model, input_tokens, positions, attention_mask)
        return jaxkd.cross_entropy(logits, jaxkd.shift_labels(input_tokens, input_mask), sharding=sharding)

    trainer = trainer.with_gen_model_input_fn(inputs)
    return trainer if sharding is None else trainer.with_loss_fn(loss, has_aux=True)


# DPO ------------------------------------------------------------------------------------------------------------------


class FusedDPOTrainer(dpo_trainer.DPOTrainer):
    """tunix's `DPOTrainer` whose policy and reference give log-probabilities without logits."""

    METRICS: ClassVar = {
        "rewards/chosen": "chosen_rewards",
        "rewards/rejected": "rejected_rewards",
        "rewards/margin": "margin",
        "rewards/accuracy": "accuracy",
        "log_probs/chosen": "chosen_log_probs",
        "log_probs/rejected": "rejected_log_probs",
    }

    def __init__(self, model, ref_model, optimizer, training_config, **options: Any):
        super().__init__(model, None, optimizer, training_config)  # no reference of tunix's, which would form logits
        self.reference, self.options = ref_model, options
        self.reference_log_probs = nnx.jit(self.log_probs)
        self.with_loss_fn(self.loss, has_aux=True)

    def log_probs(self, model, example: dpo_trainer.TrainExample) -> list[jax.Array]:
        """(B,) of the chosen answers, and of the rejected ones."""
        is_answer = jnp.zeros(example.input_ids.shape, bool)
        is_answer = is_answer.at[:, -example.logits_to_keep :].set(example.completion_mask)
        logits = linear_logits(model, example.input_ids, example.positions, example.attention_mask)
        labels = jaxkd.shift_labels(example.input_ids, is_answer)
        return jnp.split(jaxkd.sequence_log_probs(logits, labels, **self.options), 2)

    def _prepare_inputs(self, training_input):
        example = super()._prepare_inputs(training_input)
        chosen, rejected = self.reference_log_probs(self.reference, example)
        return example.replace(ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    def loss(self, model, train_example, algorithm, beta, label_smoothing):
        chosen, rejected = self.log_probs(model, train_example)
        loss, metrics = jaxkd.preference.cdpo(
            chosen,
            rejected,
            train_example.ref_chosen_logps,
            train_example.ref_rejected_logps,
            beta=beta,
            label_smoothing=label_smoothing,
        )
        return loss, {name: metrics[ours] for name, ours in self.METRICS.items()}


def preference_trainer(policy, reference, optimizer, sharding: jaxkd.Sharding | None) -> dpo_trainer.DPOTrainer:
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=1000, beta=BETA)
    if sharding is None:
        return dpo_trainer.DPOTrainer(policy, reference, optimizer, config)
    return FusedDPOTrainer(policy, reference, optimizer, config, sharding=sharding)


# The run --------------------------------------------------------------------------------------------------------------

TRAINERS = {"sft": sft_trainer, "distillation": distillation_trainer, "dpo": preference_trainer}


def make_mesh() -> Mesh:
    tp = 2 if len(jax.devices()) % 2 == 0 else 1
    return jax.make_mesh((len(jax.devices()) // tp, tp), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


def make_model(name: str | None, tiny: qwen3.ModelConfig, weights: str | None, mesh: Mesh, seed: int) -> nnx.Module:
    config = tiny
    if name is not None:
        named = getattr(qwen3.ModelConfig, name)()
        config = dataclasses.replace(named, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    if weights is not None:
        return qwen3_params.create_model_from_safe_tensors(weights, config, mesh)
    return reshard.reshard_model_to_mesh(qwen3.Qwen3(config, rngs=nnx.Rngs(seed)), mesh)


def with_lora(model: Any, mesh: Mesh, rank: int = 8) -> nnx.Module:
    provider = qwix.LoraProvider(module_path=LORA_ON, rank=rank, alpha=2.0 * rank)
    model = qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(0))
    return reshard.reshard_model_to_mesh(model, mesh)


def read_batches(steps: int, batch: int, length: int) -> dict[str, list[Any]]:
    """For each trainer: passages, or beginnings of passages with their true ends and with those of others."""
    words, _ = read_words(TINY_STUDENT.vocab_size, held_out=1)
    rng = np.random.default_rng(0)

    def masked(*tokens: np.ndarray) -> list[np.ndarray]:
        return [x for part in tokens for x in (part, np.ones(part.shape, bool))]

    def texts() -> list[np.ndarray]:
        return [np.asarray(random_windows(words, rng, batch, length)) for _ in range(steps)]

    half = length // 2
    pairs = [(x[:, :half], x[:, half:], other[:, half:]) for x, other in zip(texts(), texts(), strict=True)]
    return {
        "teacher": [peft_trainer.TrainingInput(*masked(x)) for x in texts()],
        "sft": [peft_trainer.TrainingInput(*masked(x)) for x in texts()],
        "distillation": [peft_trainer.TrainingInput(*masked(x)) for x in texts()],
        "dpo": [dpo_trainer.TrainingInput(*masked(*parts)) for parts in pairs],
    }


def sizes_of_step(trainer: peft_trainer.PeftTrainer, batch: Any) -> tuple[float, float]:
    """MiB of a device: the temporaries of a training step, and its batch with what teacher or reference made of it."""
    inputs = sharding_utils.shard_input(trainer._prepare_inputs(batch), trainer.config.data_sharding_axis)
    step = nnx.jit(trainer.create_train_step_fn(), donate_argnames=("optimizer",))
    sizes: Any = step.lower(trainer.model, trainer.optimizer, inputs).compile().memory_analysis()
    shards = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(inputs)]
    return sizes.temp_size_in_bytes / 2**20, sum(shards) / 2**20


def train_both(name: str, model: nnx.Module, fixed: Any, batches: list[Any], rate: float, sharding: Any) -> nnx.Module:
    """Trains the model from where it is by tunix's loss and by jaxkd's, and returns what came of the latter."""
    losses, sizes = [], []
    for place in (None, sharding):
        trained = nnx.clone(model)
        trainer = TRAINERS[name](trained, fixed, optax.adamw(rate), place)
        sizes.append(sizes_of_step(trainer, batches[0]))
        trainer.train(batches)
        losses.append(trainer.metrics_logger.get_metric_history("", "loss", "train"))
    dense, ours = losses
    for step in range(0, len(batches), max(len(batches) // 4, 1)):
        print(f"{name} step {step + 1:3d}  loss of tunix {dense[step]:.6f}  of jaxkd {ours[step]:.6f}")
    print(f"{name}: largest relative difference of {len(batches)} losses: {np.max(np.abs(ours / dense - 1)):.1e}")
    for who, (temporaries, inputs) in zip(("tunix", "jaxkd"), sizes, strict=True):
        print(f"{name}: a step of {who} takes {temporaries:.1f} MiB of a device, and its inputs {inputs:.1f} MiB")
    return trained


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="tunix's trainers, with their dense losses and with jaxkd's.")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=["distillation"])
    parser.add_argument("--steps", type=int, default=12, help="steps of each trainer")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    for who in ("student", "teacher"):
        parser.add_argument(f"--{who}", help="a configuration of tunix's Qwen3, such as qwen3_0p6b; none is a tiny one")
        parser.add_argument(f"--{who}-weights", help="a folder of its safetensors; none is random weights")
    options = parser.parse_args(arguments)

    mesh = make_mesh()
    sharding = jaxkd.Sharding("fsdp", ("tp", "fsdp"), mesh)
    batches = read_batches(options.steps, options.batch, options.length)
    with mesh:  # where tunix looks for it; `jax.set_mesh` is not seen by its trainers
        teacher = make_model(options.teacher, TINY_TEACHER, options.teacher_weights, mesh, seed=0)
        student = make_model(options.student, TINY_STUDENT, options.student_weights, mesh, seed=1)
        if "distillation" in options.trainers and options.teacher_weights is None:
            sft_trainer(teacher, None, optax.adamw(options.learning_rate), sharding).train(batches["teacher"])
        if "sft" in options.trainers:
            student = train_both("sft", student, None, batches["sft"], options.learning_rate, sharding)
        student = with_lora(student, mesh)
        for name in ("distillation", "dpo"):
            if name in options.trainers:
                fixed = teacher if name == "distillation" else nnx.clone(student)
                student = train_both(name, student, fixed, batches[name], options.learning_rate, sharding)


if __name__ == "__main__":
    main()
