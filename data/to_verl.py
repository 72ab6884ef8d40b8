"""Take problems and a run's flags to verl, where one GPU is not enough.

    python data/to_verl.py --to verl_data --data pool.jsonl --model Qwen/Qwen2.5-7B-Instruct \\
        --method grpo --group_size 8 --max_new_tokens 8192 --lr 1e-6
    python data/to_verl.py --to verl_data --run runs/grpo-0     # the flags of a run

It writes train.parquet, and valid.parquet of the valid.jsonl beside --data, into the folder --to,
and prints the command that starts verl with the flags of ampo.py translated. verl itself has GRPO
and PPO. With --method ampo the command is that of the official AMPO, which reads the same file and
runs on a verl of its own. The other methods have no counterpart in verl; what cannot be translated
is printed below the command.

The rewards are ours: the command makes verl call compute_score in this file.
"""
import argparse
import json
import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
import ampo
from convert import import_pyarrow, refuse

# ---------------------------------------------------------------------------------------------------
# The flags of ampo.py and what verl calls them

# Read from verl/trainer/config/ppo_trainer.yaml and the files that it names.
VERL = "verl 0.9.1"
VERL_COMMAND = "python -m verl.trainer.main_ppo"

# A row a flag. In braces: flags of ampo.py, and what values_of() makes of several of them.
TABLE = {
    "model": "actor_rollout_ref.model.path={model}",
    "data": "data.train_files={train} data.val_files={valid}",
    "prompts_per_step": "data.train_batch_size={prompts_per_step}",
    "num_minibatches": "actor_rollout_ref.actor.ppo_mini_batch_size={minibatch}",
    "group_size": "actor_rollout_ref.rollout.n={group_size}",
    "temperature": "actor_rollout_ref.rollout.temperature={temperature}",
    "max_new_tokens": "data.max_response_length={max_new_tokens}",
    "lr": "actor_rollout_ref.actor.optim.lr={lr} actor_rollout_ref.actor.optim.weight_decay=0.1",
    "advantage": "algorithm.adv_estimator={estimator}",
    "gae_lambda": "algorithm.lam={gae_lambda}",
    # clip_ratio alone changes nothing: the other two have values of their own.
    "clip_eps": "actor_rollout_ref.actor.clip_ratio_low={clip_eps}"
                " actor_rollout_ref.actor.clip_ratio_high={clip_eps}",
    "entropy_coef": "actor_rollout_ref.actor.entropy_coeff={entropy_coef}",
    "recipe": "algorithm.norm_adv_by_std_in_grpo={std}"
              " actor_rollout_ref.actor.loss_agg_mode={loss_agg_mode}"
              " reward.custom_reward_function.path={this_file}"
              " reward.custom_reward_function.name=compute_score"
              " +reward.custom_reward_function.reward_kwargs.right_reward={right_reward}"
              " +reward.custom_reward_function.reward_kwargs.format_reward={format_reward}",
    "micro_tokens": "actor_rollout_ref.actor.use_dynamic_bsz=True"
                    " actor_rollout_ref.actor.ppo_max_token_len_per_gpu={longest_pass}",
    # A share of the card's memory, where ours is a number of tokens.
    "cache_tokens": "actor_rollout_ref.rollout.gpu_memory_utilization=0.5",
    "gradient_checkpointing": "actor_rollout_ref.model.enable_gradient_checkpointing"
                              "={gradient_checkpointing}",
    "seed": "data.seed={seed} actor_rollout_ref.rollout.seed={seed}",
    "steps": "trainer.total_training_steps={steps} trainer.total_epochs={epochs}",
    "eval_every": "trainer.test_freq={test_freq} trainer.val_before_train={evaluates}",
    "samples": "actor_rollout_ref.rollout.val_kwargs.n={samples}"
               " actor_rollout_ref.rollout.val_kwargs.temperature=0.6"
               " actor_rollout_ref.rollout.val_kwargs.do_sample=True",
    "save_every": "trainer.save_freq={save_every}",
    "out": "trainer.default_local_dir={checkpoints}",
    "resume": "trainer.resume_mode={resume_mode}",
}

# What no flag says: ampo.py has neither a KL penalty nor dual clipping.
ALWAYS = (
    "actor_rollout_ref.actor.use_kl_loss=False algorithm.use_kl_in_reward=False"
    " actor_rollout_ref.actor.clip_ratio_c=1000000"
    " actor_rollout_ref.rollout.name=vllm"
    " actor_rollout_ref.rollout.tensor_model_parallel_size=1"
    " data.max_prompt_length={max_prompt_tokens} data.filter_overlong_prompts=True"
    " trainer.n_gpus_per_node={gpus} trainer.nnodes=1 trainer.logger=[console]"
)

# --advantage gae: verl's critic is a model of its own, ours a layer on the student's.
CRITIC = ("critic.model.path={model} critic.optim.lr={lr}"
          " critic.ppo_max_token_len_per_gpu={longest_pass}")

# Read from exp_scripts/train_ampo.sh and verl/adaptive_mix_src of SII-Enigma/AMPO, October 2025
# (commit b88d365), which brings verl 0.5.0.dev along. It has rewards of its own.
AMPO = "the official AMPO, commit b88d365"
AMPO_COMMAND = "python -m verl.adaptive_mix_src.main_mix_dapo"
AMPO_TABLE = {
    **TABLE,
    "recipe": "algorithm.norm_adv_by_std_in_grpo={std}"
              " actor_rollout_ref.actor.loss_remove_token_mean={constant}"
              " actor_rollout_ref.actor.loss_remove_clip={no_clip}"
              " reward_model.format_coefficient={format_reward}",
    "seed": "",
    "k": "data.num_off_policy_targets={k}",
    "gamma": "actor_rollout_ref.actor.off_policy_reshape=p_div_p_{gamma}",
    "trigger": "actor_rollout_ref.rollout.injection_strategy={injection}",
    "select": "actor_rollout_ref.rollout.target_selection_strategy={selection}"
              " data.length_strategy={length_strategy}",
}
AMPO_ALWAYS = ALWAYS + (
    " data.max_available_targets={max_teachers} data.truncation=right"
    " data.reward_impl_version=5 data.val_reward_impl_version=5"
    " reward_model.reward_manager=naive reward_model.val_reward_manager=naive"
    " reward_model.off_policy_reward_manager=prob"
    " actor_rollout_ref.actor.use_off_policy_loss=True"
    " actor_rollout_ref.actor.off_policy_loss_impl=seq"
    " actor_rollout_ref.rollout.max_prefix_len={max_new_tokens}"
    " actor_rollout_ref.rollout.min_prefix_ratio=1.0"
    " actor_rollout_ref.ref.use_ref=False"
)

# Our averages over tokens -> verl's. The two in quotes are not the same, but the nearest ones.
AVERAGES = {
    "constant": "seq-mean-token-sum-norm",
    "responses": "seq-mean-token-mean",
    "tokens": "token-mean",
    "groups": "token-mean",  # "groups": ours averages the groups' means, verl's all tokens
    "split": "token-mean",   # "split": differs from it for traces only, which verl has not
}

# Flags that stand in the data, or that choose the command and the recipe.
ELSEWHERE = ("system", "method", "follow")


def values_of(cfg, recipe, args, problems):
    """What the braces of the tables stand for."""
    values = asdict(cfg)
    values.update(asdict(recipe))
    if math.isinf(recipe.clip_eps):
        values["clip_eps"] = 1000000
    valid = args.to / "valid.parquet"
    values.update(
        train=args.to / "train.parquet",
        valid=valid if valid.exists() else args.to / "train.parquet",
        this_file=Path(__file__).resolve(),
        checkpoints=cfg.out or f"runs/{cfg.method}-{cfg.seed}",
        minibatch=cfg.prompts_per_step // cfg.num_minibatches,
        estimator="gae" if cfg.advantage == "gae" else "grpo",
        loss_agg_mode=AVERAGES[recipe.average],
        constant=recipe.average == "constant",
        no_clip=math.isinf(recipe.clip_eps),
        longest_pass=max(cfg.micro_tokens, args.max_prompt_tokens + cfg.max_new_tokens),
        epochs=math.ceil(cfg.steps * cfg.prompts_per_step / len(problems)) + 1,
        test_freq=cfg.eval_every if cfg.eval_every and valid.exists() else -1,
        evaluates=bool(cfg.eval_every and valid.exists()),
        resume_mode="auto" if cfg.resume else "disable",
        gpus=args.gpus,
        max_prompt_tokens=args.max_prompt_tokens,
        max_teachers=max(len(problem.teachers) for problem in problems),
        injection="always" if cfg.trigger == "always" else "adaptive",
        selection="random_k" if cfg.select == "random" else "best_k",
        length_strategy="long" if cfg.select == "longest" else "short",
    )
    return values


def translate(cfg, values):
    """-> the words of the command, and the flags in no table that are not at their defaults."""
    table = AMPO_TABLE if cfg.method == "ampo" else TABLE
    templates = [*table.values(), AMPO_ALWAYS if cfg.method == "ampo" else ALWAYS]
    if cfg.advantage == "gae":
        templates.append(CRITIC)
    words = []
    for template in templates:
        for word in template.split():
            words.append(word.format(**values))
    usual = asdict(ampo.Config())
    missing = []
    for name, value in asdict(cfg).items():
        if name not in table and name not in ELSEWHERE and value != usual[name]:
            missing.append(name)
    return words, missing


def command_text(cfg, words):
    """The command as it is typed, one setting a line."""
    command = AMPO_COMMAND if cfg.method == "ampo" else VERL_COMMAND
    return " \\\n    ".join([command, *(shlex.quote(word) for word in words)])


def remarks(cfg, recipe, missing):
    """What the command does not do as ampo.py does."""
    lines = []
    if cfg.method not in ("grpo", "ampo"):
        lines.append(f"verl has no --method {cfg.method}: this is GRPO under the same recipe")
    if cfg.method == "ampo" and cfg.trigger == "half":
        lines.append("--trigger half is not in this version of the official code")
    if cfg.method == "ampo" and cfg.select in ("shortest", "longest"):
        lines.append(f"--select {cfg.select} is only the order in which traces are offered")
    if cfg.method == "ampo" and cfg.gamma not in (0.1, 0.3, 0.5):
        lines.append(f"--gamma {cfg.gamma}: the official code knows 0.1, 0.3 and 0.5 only")
    if recipe.average in ("groups", "split"):
        lines.append(f"average over tokens: {AVERAGES[recipe.average]} is only the nearest one")
    if missing:
        flags = ", ".join("--" + name for name in missing)
        lines.append(f"not translated: {flags}")
    return lines


# ---------------------------------------------------------------------------------------------------
# The rewards


def compute_score(data_source, solution_str, ground_truth, extra_info=None, right_reward=1.0,
                  format_reward=0.0, **others):
    """What verl calls for each response: our verifier, and the recipe's two rewards."""
    question = (extra_info or {}).get("question", "")
    right = ampo.verify(solution_str, ground_truth, question)
    answered = ampo.gives_answer(solution_str, ground_truth, question)
    return {"score": right_reward * right + format_reward * answered, "acc": float(right)}


# ---------------------------------------------------------------------------------------------------
# The data


def to_row(problem, index, split, system):
    """A Problem as a row of verl; target_lst is the official AMPO's, hint and solution are ours."""
    messages = [{"role": "user", "content": problem.question}]
    system = problem.system if problem.system else system
    if system:
        messages.insert(0, {"role": "system", "content": system})
    targets = []
    for name, text in problem.teachers.items():
        # The official code offers traces of high quality first, and calls short ones so.
        targets.append({"source": name, "content": text, "quality_score": 1 / len(text)})
    return {
        "data_source": "ampo.py",
        "prompt": messages,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "target_lst": targets if targets else None,
        "hint": problem.hint if problem.hint else None,
        "solution": problem.solution if problem.solution else None,
        "extra_info": {
            "index": index,
            "split": split,
            "question": problem.question,
            "num_teacher_models": len(targets),
        },
    }


def schema_of(pyarrow):
    """The columns of the file. Written out, as a column that is empty has no type of its own."""
    text = pyarrow.string()
    message = pyarrow.struct({"role": text, "content": text})
    target = pyarrow.struct({"source": text, "content": text, "quality_score": pyarrow.float64()})
    info = pyarrow.struct({"index": pyarrow.int64(), "split": text, "question": text,
                           "num_teacher_models": pyarrow.int64()})
    return pyarrow.schema({
        "data_source": text,
        "prompt": pyarrow.list_(message),
        "ability": text,
        "reward_model": pyarrow.struct({"style": text, "ground_truth": text}),
        "target_lst": pyarrow.list_(target),
        "hint": text,
        "solution": text,
        "extra_info": info,
    })


def write_parquet(problems, path, split, system, pyarrow):
    """Write the problems into a new file."""
    rows = [to_row(problem, i, split, system) for i, problem in enumerate(problems)]
    table = pyarrow.Table.from_pylist(rows, schema=schema_of(pyarrow))
    with open(path, "xb") as file:  # x: not even if it was made in the meantime
        pyarrow.parquet.write_table(table, file)


def write_data(cfg, args):
    """Write train.parquet, and valid.parquet if there are problems for it. Returns the problems."""
    pyarrow = import_pyarrow(Path(cfg.data))
    problems = ampo.load_problems(cfg.data)
    untaught = [problem for problem in problems if not problem.teachers]
    if args.only_taught:
        problems = [problem for problem in problems if problem.teachers]
    if not problems:
        raise ampo.InputError(f"{cfg.data}: no problem has a trace")
    valid = Path(cfg.data).parent / "valid.jsonl"
    held_out = ampo.load_problems(valid) if valid.exists() else []
    for name in ("train.parquet", "valid.parquet"):
        if (args.to / name).exists():
            raise ampo.InputError(f"--to {args.to}: {name} exists already, and is not overwritten")
    args.to.mkdir(parents=True, exist_ok=True)
    write_parquet(problems, args.to / "train.parquet", "train", cfg.system, pyarrow)
    print(f"{args.to / 'train.parquet'}: {len(problems)} problems of {cfg.data}")
    if held_out:
        write_parquet(held_out, args.to / "valid.parquet", "valid", cfg.system, pyarrow)
        print(f"{args.to / 'valid.parquet'}: {len(held_out)} problems of {valid}")
    if untaught:
        what = "are left out" if args.only_taught else "the official AMPO's reader stops at them"
        print(f"{len(untaught)} problems have no trace (first: {untaught[0].where}): {what}")
    return problems


# ---------------------------------------------------------------------------------------------------
# The command line


def saved_flags(folder):
    """The flags of the run in a folder; none without one."""
    if folder is None:
        return {}
    path = folder / "run.json"
    names = asdict(ampo.Config())
    try:
        flags = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        flags = {"": ""}
    if not set(flags) <= set(names):
        raise ampo.InputError(f"{path}: does not hold the flags of ampo.py")
    return flags


def parse_args(argv):
    """-> our own flags, and the Config of ampo.py."""
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("to_verl.py", description=about, allow_abbrev=False,
                                     epilog="All flags of ampo.py may be given as well.")
    parser.error = refuse
    add = parser.add_argument
    add("--to", type=Path, required=True, help="the folder to write into")
    add("--run", type=Path, help="a run of ampo.py, whose flags are taken")
    add("--gpus", type=int, default=8, help="GPUs on the machine [8]")
    add("--max_prompt_tokens", type=int, default=1024, help="verl drops longer prompts [1024]")
    add("--only_taught", action="store_true", help="leave out problems without a trace")
    args, others = parser.parse_known_args(argv)
    cfg = ampo.parse_flags(others, saved_flags(args.run))
    if cfg.prompts_per_step % cfg.num_minibatches:
        raise ampo.InputError(f"--prompts_per_step {cfg.prompts_per_step}: must be a multiple of "
                              f"--num_minibatches, as verl's minibatches are of one size")
    return args, cfg


def run(argv):
    """Write the files, print the command."""
    args, cfg = parse_args(argv)
    recipe = ampo.choose_recipe(cfg)
    problems = write_data(cfg, args)
    words, missing = translate(cfg, values_of(cfg, recipe, args, problems))
    print(f"\n# {AMPO if cfg.method == 'ampo' else VERL}")
    print(command_text(cfg, words))
    for line in remarks(cfg, recipe, missing):
        print(f"# {line}")


def main(argv=None):
    """Returns the exit status: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    try:
        run(argv)
    except KeyboardInterrupt:
        print("to_verl.py: stopped", file=sys.stderr)
        return 130
    except (ampo.InputError, OSError) as error:
        print(f"to_verl.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
