"""One training step as a page for the projector: what each method makes of the same rollouts.

    python data/show.py                                # a failed problem, AMPO first: step.html
    python data/show.py --problem 3 --out three.html   # line 3 of --data, whatever happens there
    python data/show.py --method guide --k 1           # Guide first; all flags of ampo.py

The rollouts are drawn once. Each method goes on from them on its own copy of the model, with its
own recipe unless --recipe names one, and this group alone is the batch of its step. The colour of
a token is its push: the derivative of the step's objective by its log-probability. All numbers
come from ampo.py's functions. The page is one file without network.
"""
import argparse
import copy
import html
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ampo  # before torch, as it sets how torch's threads wait

import torch

BESIDE = ("grpo", "luffy", "ampo", "guide", "ghpo")
LOOKED_AT = 100  # problems that are tried until the rollouts of one call for guidance

# -------------------------------------------------------------------------------------------------
# Computing


@dataclass(frozen=True)
class Response:
    """One response of the group that is trained on; lists have an item a token."""

    title: str             # who wrote it, and whom it replaces
    sample: ampo.Sample
    texts: list
    logps: list            # in nats, before the update
    pushes: list           # the derivative of the step's objective by them


@dataclass(frozen=True)
class Trace:
    """What the student thinks of a teacher's trace."""

    name: str
    text: str
    p: float               # the geometric mean of its tokens' probabilities
    answer: list           # of (token, probability): the gold answer after the trace
    comprehension: float


@dataclass(frozen=True)
class Step:
    """One method's step on one group."""

    student: ampo.Student  # without its weights
    problem: ampo.Problem
    rollouts: list         # Samples, with the rewards of the recipe
    responses: list
    gamma: float           # of this step
    grad_norm: float
    before: list           # Traces
    after: list


def copy_for(student, name):
    """A student of another method with weights of its own, without a --follow it has no row for."""
    cfg = replace(student.cfg, method=name)
    method = ampo.METHODS[name]
    if (cfg.recipe if cfg.recipe else method.recipe, cfg.follow) not in ampo.RECIPES:
        cfg = replace(cfg, follow="")
    student = replace(student, cfg=cfg, method=method, recipe=ampo.choose_recipe(cfg))
    return copy.deepcopy(student)


def draw(student, problem):
    """G rollouts of a problem, the same ones whichever problems were tried before."""
    torch.manual_seed(student.cfg.seed)
    (group,) = ampo.rollout(student, [problem], [problem.question])
    return group


def pick(student, line=None):
    """The problem on a line of --data, or the first that calls for guidance, and its rollouts."""
    path = student.cfg.data
    for field in ("hint", "solution"):  # which are messages too
        problems = ampo.load_checked(student, path, field)
    for problem in problems:
        if problem.where == f"{path}:{line}":
            return problem, draw(student, problem)
    if line is not None:
        raise ampo.InputError(f"--problem {line}: no problem on this line of {path}")
    needs = student.method.needs
    for problem in problems[:LOOKED_AT]:
        rollouts = draw(student, problem)
        usable = not needs or getattr(problem, needs)
        if usable and ampo.needs_guidance(rollouts, student.cfg.trigger):
            return problem, rollouts
    raise ampo.InputError(f"{path}: none of its first problems calls for guidance and has what "
                          f"{student.cfg.method} needs; --problem N shows one all the same")


def token_texts(tokenizer, ids):
    """The text of each token, or a mark for a part of a character."""
    texts = []
    for i in range(len(ids)):
        before = tokenizer.decode(ids[:i][-1:])
        both = tokenizer.decode(ids[:i + 1][-2:])  # some tokenizers drop the space of a first one
        texts.append(both[len(before):] if len(both) > len(before) else "\ufffd")
    return texts


@torch.no_grad()
def answer_after(student, problem, trace):
    """(token, probability) of the gold answer in the place of the trace's own (AMPO Eq. 5)."""
    lead = ampo.trace_lead(trace)
    if not lead:
        return []
    before, answer = ampo.cut_answer(student.tokenizer, lead, problem.answer)
    context = ampo.prompt_of(student, problem) + before
    logps, _ = ampo.token_logps(student.rollout_model, [context], [answer])          # (1, T)
    return list(zip(token_texts(student.tokenizer, answer), logps[0].exp().tolist()))


@torch.no_grad()
def read_traces(student, problem):
    """What the student thinks of each teacher's trace that is not too long for it."""
    samples = ampo.teacher_samples(student, problem)
    scores = ampo.comprehension(
        student.rollout_model, student.tokenizer, problem, [sample.text for sample in samples],
        ampo.comprehension_mean(student.cfg), student.cfg.system,
    )
    traces = []
    for sample, score in zip(samples, scores):
        logps, _, _, _ = ampo.score_samples(student, [sample])                       # (1, T)
        p = logps.mean().exp().item()
        answer = answer_after(student, problem, sample.text)
        traces.append(Trace(sample.source, sample.text, p, answer, score))
    return traces


def read_response(student, title, sample, gamma):
    """A sample with the log-probabilities of its tokens and their pushes."""
    with torch.no_grad():
        logps, _, _, _ = ampo.score_samples(student, [sample])                       # (1, T)
    logps.requires_grad_()
    objective = ampo.policy_objective(
        logps, torch.tensor([sample.old_logps]).to(logps),
        torch.tensor([sample.advantages]).to(logps),
        torch.tensor([sample.off_policy], device=logps.device), student.recipe.clip_eps, gamma,
        "log" if student.method.imitates else student.cfg.shaping,
    )
    (pushes,) = torch.autograd.grad(sample.weight * objective.sum(), logps)
    texts = token_texts(student.tokenizer, sample.ids)
    return Response(title, sample, texts, logps[0].tolist(), pushes[0].tolist())


def title_of(sample, group, rollouts):
    """Who wrote a response of a group, and its place there."""
    slots = [i for i, other in enumerate(group, 1) if other.ids is sample.ids]
    place = f"rollout {slots[0]}"
    if sample.source == "student":
        return place
    if sample.source == "hint":
        return f"guided {place}"
    return f"trace of {sample.source}" + (f", in place of {place}" if rollouts else "")


def take_step(student, problem, rollouts):
    """The step that a student's method makes of the rollouts. The student's weights move."""
    cfg = student.cfg
    own = []
    for sample in rollouts if student.method.rollouts else []:
        correct, reward = ampo.verdict(student.recipe, problem, sample.text)
        own.append(replace(sample, correct=correct, reward=reward))
    before = read_traces(student, problem)
    torch.manual_seed(cfg.seed)
    (group,) = student.method.guide(student, [problem], [own])
    (ready,) = ampo.add_advantages(student, [group])
    (weights,) = ampo.token_weights([ready], student.recipe, cfg.max_new_tokens)
    gamma = cfg.gamma
    if student.method.measured_gamma:
        gamma = ampo.guided_gamma(student, [sample for sample in ready if any(sample.advantages)])
    responses = []
    for sample, weight in zip(ready, weights):
        title = title_of(sample, group, own)
        responses.append(read_response(student, title, replace(sample, weight=weight), gamma))
    grad_norm = ampo.update(student, ampo.make_optimizer(student), [ready])["grad_norm"]
    after = read_traces(student, problem)
    student = replace(student, model=None, rollout_model=None, value_head=None)
    return Step(student, problem, own, responses, gamma, grad_norm, before, after)


# -------------------------------------------------------------------------------------------------
# Writing: functions that return HTML. What a model or a file says goes through `escape`.

RULES = {
    "never": "never called",
    "fail": "called where no rollout is right (AMPO Eq. 3)",
    "half": "called where fewer than half of the rollouts are right",
    "always": "called for every group",
}
SHAPINGS = {"f": "A · ratio / (ratio + γ)", "ratio": "A · ratio", "log": "A · log ratio"}


def escape(text):
    """Text for a page, with a mark where a line ends."""
    return html.escape(text).replace("\r", "␍").replace("\n", "⏎<br>")


def tag(name, content, attributes=""):
    """<name attributes>content</name>; all of it is HTML."""
    opening = f"{name} {attributes}".strip()
    return f"<{opening}>{content}</{name}>"


def paragraph(text):
    return tag("p", escape(text))


def sign(value):
    """The class of a number: up is blue and underlined, down is red and dotted."""
    if value == 0:
        return "zero"
    return "up" if value > 0 else "down"


def change(before, after):
    """Two probabilities, and which way it went."""
    kind = sign(after - before)
    arrow = {"up": " ▲", "down": " ▼", "zero": ""}[kind]
    return f"{before:.3f} → " + tag("b", f"{after:.3f}{arrow}", f"class={kind}")


def cards(boxes):
    """Boxes side by side, each (title, facts beside it, HTML that it holds)."""
    done = []
    for title, facts, body in boxes:
        spans = [tag("span", escape(fact)) for fact in facts]
        done.append(tag("article", tag("h4", escape(title) + "".join(spans)) + body))
    return tag("div", "".join(done), "class=cards")


def chips(tokens):
    """Tokens above their probabilities, each on a bar of its length; tokens: (text, p, ...)."""
    done = []
    for text, *probabilities in tokens:
        bars = [tag("i", f"{p:.2f}", f"style=--strength:{p:.2f}") for p in probabilities]
        shown = tag("b", escape(text).replace("<br>", ""))
        done.append(tag("span", shown + "".join(bars), "class=chip"))
        if "\n" in text:
            done.append("<br>")
    return tag("div", "".join(done))


def verdict_facts(sample):
    """What the verifier makes of a response, and its reward."""
    answer = ampo.extract_answer(sample.text)
    read = "no answer to read" if answer is None else f"reads {answer}"
    return ["✓ right" if sample.correct else "✗ wrong", read, f"reward {sample.reward:.3g}"]


def tokens_html(response, scale):
    """Tokens in the colour of their push. The label is what one says on hover and focus."""
    sample = response.sample
    done = []
    for text, logp, push, old_logp, advantage in zip(
        response.texts, response.logps, response.pushes, sample.old_logps, sample.advantages
    ):
        label = (f"“{text}” · push {push:+.3g} · p {math.exp(logp):.3f} · log p {logp:.3f} · "
                 f"old log p {old_logp:.3f} · ratio {math.exp(min(20, logp - old_logp)):.3g} · "
                 f"A {advantage:+.3g} · weight {sample.weight:.3g}")
        label = html.escape(label.replace("\n", "⏎"))
        strength = abs(push) / scale if scale else 0
        done.append(tag("span", escape(text), f'class="token {sign(push)}" tabindex=0 role=img '
                        f'style=--strength:{strength:.2f} aria-label="{label}"'))
    return tag("div", "".join(done), "class=text")


def verdicts(step):
    """The rollouts before guidance."""
    recipe = step.student.recipe
    boxes = []
    for i, sample in enumerate(step.rollouts):
        text = tag("div", escape(sample.text), "class=text")
        boxes.append((f"rollout {i + 1}", verdict_facts(sample), text))
    return paragraph(
        f"The student writes {len(step.rollouts)} rollouts. The verifier compares the answer in "
        f"the last box with the gold one. The reward is {recipe.right_reward:g} for a right answer "
        f"plus {recipe.format_reward:g} for one that can be read."
    ) + cards(boxes)


def guidance(step):
    """Why guidance was called or not, and what came of it."""
    cfg = step.student.cfg
    trigger = {"grpo": "never", "ghpo": "fail"}.get(cfg.method, "always")
    if cfg.method in ("ampo", "guide"):
        trigger = cfg.trigger
    right = sum(sample.correct for sample in step.rollouts)
    says = f"Guidance is {RULES[trigger]}. Here {right} of {len(step.rollouts)} are right."
    guided = [response for response in step.responses if response.sample.source != "student"]
    called = trigger != "never" and ampo.needs_guidance(step.rollouts, trigger)
    if not called:
        says += " The group stays as it is: no guidance."
    elif not guided:
        says += f" But the problem has no {step.student.method.needs} that can be used."
    elif guided[0].sample.source == "hint":
        solved = sum(response.sample.correct for response in guided)
        says += f" It is called: {solved} of {len(guided)} guided rollouts are right."
    else:
        says += f" It is called: {'; '.join(response.title for response in guided)}."
    if cfg.method == "ampo":
        return paragraph(says) + traces_view(step, guided)
    if cfg.method == "guide" and guided:
        return paragraph(says) + hint_view(step, guided)
    if cfg.method == "ghpo" and guided:
        return paragraph(says) + prefix_view(step, guided)
    return paragraph(says)


def traces_view(step, guided):
    """AMPO: how well each trace is comprehended."""
    chosen = [response.sample.source for response in guided]
    boxes = []
    for trace in step.before:
        choice = "✓ chosen" if trace.name in chosen else "not chosen"
        body = tag("div", escape(trace.text), "class=text") + chips(trace.answer)
        boxes.append((trace.name, [f"r = {trace.comprehension:.3f}", choice], body))
    cfg = step.student.cfg
    left_out = sorted(set(step.problem.teachers) - {trace.name for trace in step.before})
    says = (
        f"Comprehension r is the {ampo.comprehension_mean(cfg)} mean of the probabilities that the student "
        "gives the gold answer's tokens after the trace (Eq. 5). The bars show them. Those chosen "
        f"(--k {cfg.k}, --select {cfg.select}) replace wrong rollouts drawn at random (Eq. 4)."
    )
    if left_out:
        says += f" Longer than --max_new_tokens: {', '.join(left_out)}."
    return paragraph(says) + cards(boxes)


def hint_view(step, guided):
    """Guide: the message with the hint, and one response with both of its probabilities."""
    right = [response for response in guided if response.sample.correct]
    response = (right + guided)[0]
    tokens = []
    for text, logp, old_logp in zip(response.texts, response.logps, response.sample.old_logps):
        tokens.append((text, math.exp(logp), math.exp(old_logp)))
    message = tag("pre", escape(step.problem.hint))
    return paragraph("The student answers the question with its hint:") + message + paragraph(
        "It trains to say so without the hint. The ratio of a token is its probability without the "
        f"hint (upper bar) over that with it (lower bar). This is {response.title}:"
    ) + chips(tokens)


def prefix_view(step, guided):
    """GHPO: the message with the beginning of the solution."""
    lead = step.problem.question + ampo.GHPO_LEAD
    for share in ampo.GHPO_SHARES:
        message = ampo.solution_prefix(step.problem, share)
        if ampo.prompt_of(step.student, step.problem, message) == guided[0].sample.prompt:
            break
    return paragraph(
        f"ω, the share of the solution that is shown, goes through {ampo.GHPO_SHARES} until a "
        f"rollout is right. This group was sampled with ω = {share}, and trains on the same prompt:"
    ) + tag("pre", escape(lead) + tag("mark", escape(message.removeprefix(lead))))


def formulas(step):
    """The advantage, the objective and the weight of a token."""
    recipe = step.student.recipe
    advantage = "(R − mean(R)) / std(R)" if recipe.std else "R − mean(R)"
    if step.student.cfg.advantage == "gae":
        advantage = "of each token by GAE, from the value head"
    shaping = "log" if step.student.method.imitates else step.student.cfg.shaping
    return tag("p", escape(
        f"advantage A   {advantage}   (AMPO Eq. 6; R, the reward)\n"
        "on-policy     min(ratio · A, clip(ratio, 1−ε, 1+ε) · A)   "
        f"(ε = {recipe.clip_eps:g}, the clip)\n"
        f"off-policy    {SHAPINGS[shaping]}   (γ = {step.gamma:.3g}, the shaping; Eq. 7)\n"
        f"weight        by the recipe's average, “{recipe.average}” in ampo.py\n"
        "push          weight · the derivative of the objective by log p\n"
        f"entropy       a bonus of {recipe.entropy_coef:g}, in the update but not in the push"
    ).replace("⏎", ""), "class=formulas")


def objective(step):
    """Every token of every response in the colour of its push."""
    scale = max([max(map(abs, response.pushes)) for response in step.responses], default=0)
    boxes = []
    for response in step.responses:
        advantage = f"advantage {response.sample.advantages[0]:+.3g}"
        facts = verdict_facts(response.sample) + [advantage]
        boxes.append((response.title, facts, tokens_html(response, scale)))
    up = tag("span", "likelier", 'class="token up" style=--strength:1')
    down = tag("span", "less likely", 'class="token down" style=--strength:1')
    legend = (f"What the step is to make {up} and what {down}; the strongest colour is a push of "
              f"{scale:.3g}. Point at a token, tap it, or go there with Tab and the arrow keys: "
              "its numbers stand at the foot of the screen.")
    if scale == 0:
        legend = "All pushes are zero: the step learns nothing from this group."
    return formulas(step) + tag("p", legend) + cards(boxes)


def section(step, full):
    """What one method does. In full: with the rollouts, and all of it unfolded."""
    method = step.student.method
    name = step.student.cfg.method
    says = method.guide.__doc__.split("\n\n")[0].split()
    parts = [tag("h2", name.upper()), paragraph(" ".join(says))]
    if full:
        prompt = ampo.prompt_of(step.student, step.problem)
        parts += [tag("h3", "Prompt"), tag("pre", escape(step.student.tokenizer.decode(prompt)))]
        parts += [tag("h3", "Rollouts and verdicts"), verdicts(step)]
    parts += [tag("h3", "Guidance"), guidance(step)]
    summary = tag("summary", tag("h3", "Advantages and objective, token by token"))
    parts.append(tag("details", summary + objective(step), "open" if full else ""))
    update = "There is no gradient: no weight moves."
    if step.grad_norm:
        update = (f"AdamW makes one update at learning rate {step.student.cfg.lr:g}. The gradient "
                  f"has norm {step.grad_norm:.3g}, and is clipped at 1.")
    parts += [tag("h3", "Update"), paragraph(update)]
    return tag("section", "".join(parts), f"id={name}")


def comparison(steps):
    """All methods side by side: the traces before and after the step of each."""
    names = [escape(trace.name) for trace in steps[0].before]
    lines = ["".join([tag("th", name, "scope=col") for name in ["method", *names]])]
    for step in steps:
        name = step.student.cfg.method
        line = tag("th", tag("a", name, f"href=#{name}"), "scope=row")
        for old, new in zip(step.before, step.after):
            comprehension = change(old.comprehension, new.comprehension)
            line += tag("td", f"p {change(old.p, new.p)}<br>r {comprehension}")
        lines.append(line)
    rows = "".join([tag("tr", line) for line in lines])
    return tag("div", tag("table", rows), "class=scroll tabindex=0")


def page(steps):
    """The whole page; the first step stands in full."""
    cfg = steps[0].student.cfg
    problem = steps[0].problem
    parts = [
        tag("h1", escape(f"{problem.question}\nGold answer: {problem.answer}").replace("⏎", "")),
        paragraph(f"One training step on {problem.where}, model {cfg.model}, seed {cfg.seed}. All "
                  "methods go on from the same model and the same rollouts. This group is the "
                  f"whole batch; in training a step has {cfg.prompts_per_step} problems. The table "
                  "shows each teacher's trace before and after the step: p, the geometric mean of "
                  "its tokens' probabilities, and r, its comprehension."),
        comparison(steps),
    ]
    parts += [section(step, full=step is steps[0]) for step in steps]
    head = ('<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            + tag("title", "One training step") + tag("style", STYLE))
    body = tag("main", "".join(parts)) + tag("script", SCRIPT)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


STYLE = """
:root { color-scheme: light dark; --paper: #f7f5f0; --card: #fff; --ink: #1a1a1a; --soft: #595959;
  --line: #d6d1c7; --up: #00578a; --down: #a34700 }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1e2126;
  --ink: #f0f0f0; --soft: #b3b6bb; --line: #41464e; --up: #6cbcf0; --down: #ff9d5c } }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.2rem 6rem; background: var(--paper);
  color: var(--ink); font: 1.1rem/1.5 system-ui, "DejaVu Sans", sans-serif }
h1 { line-height: 1.4; overflow-wrap: anywhere } h3 { font-size: 1.2rem; margin: 1.8rem 0 .4rem }
h2 { font-size: 1.7rem; margin: 3rem 0 .3rem; border-top: 3px solid; padding-top: .6rem }
h4 { font-size: 1rem; margin: 0 0 .4rem; display: flex; flex-wrap: wrap; column-gap: .9rem }
h4 span { font-weight: 400; color: var(--soft) } p { max-width: 62rem; margin: .4rem 0 }
a, b.up { color: var(--up) } b.down { color: var(--down) }
.formulas, pre, .text { font-family: ui-monospace, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere }
pre, article, table { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
pre, article { padding: .7rem .9rem; margin: .4rem 0 }
mark { background: rgb(0 158 115 / .35); color: inherit } summary { cursor: pointer }
summary h3 { display: inline } details { margin-top: 1.8rem }
.scroll { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; white-space: nowrap }
th, td { text-align: left; padding: .3rem .8rem; border: 1px solid var(--line) }
.cards { display: grid; gap: 0 .8rem; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)) }
.token { border-radius: 3px; line-height: 1.8; text-underline-offset: .25em;
  background: rgb(var(--hue) / calc(var(--strength) * .75)) }
.token.up { --hue: 0 114 178; text-decoration: underline 2px var(--up) }
.token.down { --hue: 213 94 0; text-decoration: underline dotted 2px var(--down) }
.token[tabindex]:is(:hover, :focus) { outline: 3px solid } .token:hover::after { z-index: 1 }
.token[tabindex]:is(:hover, :focus)::after { content: attr(aria-label); position: fixed;
  inset: auto 0 0; padding: .7rem 1.2rem; background: var(--ink); color: var(--paper) }
.chip { display: inline-grid; min-width: 2.6rem; margin: 4px 2px; text-align: center }
.chip i { --bar: 0 158 115; font: .8rem sans-serif; background: linear-gradient(to right,
  rgb(var(--bar) / .45) calc(var(--strength) * 100%), rgb(128 128 128 / .18) 0) }
.chip i + i { --bar: 204 121 167 }
@media print { :root { --paper: #fff } body { font-size: 10pt; padding: 0 } h2, h3 { break-after:
  avoid } article, tr, pre { break-inside: avoid } .scroll { overflow: visible }
  .token::after { display: none !important } }
"""
# Arrow keys walk through a response, and Tab goes from one to the next. Print unfolds all.
SCRIPT = """
for (const row of document.querySelectorAll(".text")) {
  const tokens = [...row.children].filter(token => token.tabIndex == 0);
  for (const token of tokens.slice(1)) token.tabIndex = -1;
  row.addEventListener("keydown", event => {
    const next = tokens[tokens.indexOf(event.target) + {ArrowRight: 1, ArrowLeft: -1}[event.key]];
    if (next) { event.preventDefault(); next.focus(); }
  });
}
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
"""


def run(argv):
    """Flags -> a page."""
    def refuse(message):
        raise ampo.InputError(message)

    parser = argparse.ArgumentParser(
        "show.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
        epilog="All flags of ampo.py besides: python ampo.py --help",
    )
    parser.error = refuse
    parser.add_argument("--out", default="step.html", help="the page [step.html]")
    parser.add_argument("--problem", type=int, help="a line of --data; unset: one that failed")
    args, flags = parser.parse_known_args(argv)
    cfg = ampo.parse_flags(flags)
    if cfg.temperature == 0:
        refuse("--temperature 0: all rollouts of a problem would be the same")
    student = ampo.load_student(cfg.model, cfg)
    problem, rollouts = pick(student, args.problem)
    names = [cfg.method] + [name for name in BESIDE if name != cfg.method]
    steps = [take_step(copy_for(student, name), problem, rollouts) for name in names]
    Path(args.out).write_text(page(steps), encoding="utf-8")
    print(f"{problem.where}: {problem.question}   page: {args.out}")


def main(argv=None):
    """Returns the exit status: 0, or 2 for what cannot be used, with one line on stderr."""
    try:
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except (ampo.InputError, OSError, torch.OutOfMemoryError) as error:
        first_line = str(error).split("\n")[0]
    print(f"show.py: {first_line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
