"""One group of measurements: a case at one size, all providers beside each other.

First every provider is checked and warmed up by itself; whoever fails gets a row that says so and no time.
Then those that passed take turns with the ceilings, mode by mode.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from cases import BASELINE, COMPILED, FORWARD, GENERATOR_ONLY, MODES, Case, Problem, make_problem
from ceilings import COPY, MATMUL, Ceilings
from checks import Checker, Verdict
from cips_kernels.testing import relative_error
from machine import cache_bytes
from measure import Call, Clock, Entry, captured, peak_bytes, rotating, take_turns
from providers import CHANNELS_LAST, PLANES, Provider, build, compiler_fault, reason_of

MIB = 2**20
GRAPH = "+graph"
SPENT = "the time budget is spent (--budget)"
GRAPH_BELOW_FLOPS = 4e12  # milliseconds on a large GPU; what takes longer hides its launches anyway
_COMPILE_SECONDS = 4.0  # a layer, both modes: the first guess, until one of the case was compiled


@dataclass
class Budget:
    """Seconds for the whole run, and what compilations have cost so far."""

    seconds: float
    started: float = field(default_factory=time.perf_counter)
    compiled: dict[str, float] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.perf_counter() - self.started)

    def compile_seconds(self, case: Case) -> float:
        """What compiling a provider for a case will cost, as far as is known."""
        return self.compiled.get(case.family, _COMPILE_SECONDS * case.layers)

    def allows_compiling(self, case: Case, reserve: float = 0.0) -> bool:
        """Whether it fits, with `reserve` and a twentieth of the budget left for what comes after it."""
        return self.left() > self.compile_seconds(case) + reserve + self.seconds / 20


@dataclass
class Options:
    """How to run: providers' names, modes, pixels sampled by the check, rounds, and how much to say."""

    device: torch.device
    providers: Sequence[str]
    modes: Sequence[str]
    sample: int
    rounds: int
    least_rounds: int
    budget: Budget
    say: Callable[[str], None]
    progress: Callable[[str, Sequence], Iterable]
    seed: int = 0
    build: Callable[..., Provider] = build
    compiler_fault: Callable[[torch.device], str | None] = compiler_fault


@dataclass
class Contender:
    """A provider in one mode that passed its check."""

    provider: Provider
    entry: Entry
    verdict: Verdict
    peak: int | None
    first_call: float
    kept: int | None = None


@dataclass
class Outcome:
    """Rows of a results file, and what was left out and why."""

    rows: list[dict] = field(default_factory=list)
    left_out: list[dict] = field(default_factory=list)

    def leave_out(
        self, case: Case | None, reason: str, provider: str | None = None, mode: str | None = None
    ) -> None:
        """Note what is not measured, and why; None stands for all of them."""
        place = (None, None, None) if case is None else (case.name, case.dtype_name, case.batch)
        keys = ("case", "dtype", "batch", "provider", "mode", "reason")
        self.left_out.append(dict(zip(keys, (*place, provider, mode, reason))))


def call_of(provider: Provider, mode: str) -> Callable[[Problem], object]:
    """What is timed: the output without a graph, or the output and every gradient."""

    def forward(problem: Problem) -> torch.Tensor:
        with torch.no_grad():
            return provider.function(problem, "fresh")

    def training(problem: Problem) -> tuple[torch.Tensor, ...]:
        output = provider.function(problem, "fresh")
        return (output.detach(), *torch.autograd.grad(output, problem.leaves, problem.grad))

    return forward if mode == FORWARD else training


def number_of_sets(case: Case, cache: int) -> int:
    """Input sets to rotate among, together twice the cache; 1 where a single call already sweeps it."""
    element = torch.finfo(case.dtype).bits // 8
    if case.name == "modulate":
        one = case.bytes_moved(FORWARD)
    else:
        one = element * case.pixels * (case.inputs * case.widths[0] + case.batch * sum(case.widths[1:]))
    return 1 if one >= cache else min(128, 2 * cache // one + 1)


def worth_capturing(case: Case, mode: str) -> bool:
    """Whether a call is also timed as a CUDA graph: by its arithmetic, not by its time, since a host that launches
    slowly, or is busy, makes the very calls long that a graph makes short."""
    return case.flops(mode) < GRAPH_BELOW_FLOPS


def release(device: torch.device) -> None:
    """Give cached memory back, so that one provider's leftovers are not another's out-of-memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


class Group:
    """A case at one size on one device; `generator_runner.py` has that of whole images."""

    def __init__(self, case: Case, options: Options, ceilings: Ceilings) -> None:
        self.case, self.options, self.ceilings = case, options, ceilings
        self.clock = Clock(options.device)
        self.names, self.modes = self.chosen(case, options)
        self._load()
        self.outcome = Outcome()

    @staticmethod
    def chosen(case: Case, options: Options) -> tuple[list[str], list[str]]:
        """Providers and modes of a case, of those asked for."""
        return [name for name in options.providers if name not in GENERATOR_ONLY], list(options.modes)

    def _load(self) -> None:
        """Input sets, and who checks."""
        options = self.options
        count = number_of_sets(self.case, cache_bytes(options.device))
        self.sets = [make_problem(self.case, options.device, options.seed + i) for i in range(count)]
        self.checker = Checker(self.sets[0], options.sample, options.seed)

    def _build(self, name: str, planes: str) -> Provider:
        return self.options.build(name, self.options.device, self.case.dtype, planes)

    def _memory(
        self, provider: Provider, call: Callable[[Problem], object], adapted: Problem
    ) -> tuple[int | None, int | None]:
        """Bytes a call holds beyond its inputs at most, and how many of them between calls, where they are told."""
        return peak_bytes(lambda: call(adapted), self.options.device), None

    def run(self, seconds: float, followers: int = 0) -> Outcome:
        """Check all, then time all.

        Args:
            seconds: what the rounds of one mode may take.
            followers: later groups of the same case. Their turn, too, must fit the budget beside what is compiled
                here; and compiling the baseline there goes before compiling another rival here.
        """
        start = time.perf_counter()
        torch.compiler.reset()
        contenders: dict[str, list[Contender]] = {mode: [] for mode in self.modes}
        planes = self._faster_planes()
        # what needs no compiler first, then the baseline of all ratios, then what time is left for
        quick = [name for name in self.names if name not in COMPILED]
        slow = sorted((n for n in self.names if n in COMPILED), key=lambda name: name != BASELINE)
        kept = 0.0
        for name in self.options.progress(f"{self.case}, checking", [*quick, *slow]):
            if name in slow:
                more = followers * self.options.budget.compile_seconds(self.case)
                self._prepare(name, planes, contenders, kept + (0.0 if name == BASELINE else more))
            else:
                self._prepare(name, planes, contenders, 0.0)
                # about what timing them takes as well
                kept = (time.perf_counter() - start) * followers
            release(self.options.device)
        for mode, those in contenders.items():
            if those:
                self._time(mode, those, seconds)
        order = {name: i for i, name in enumerate(self.names)}
        self.outcome.rows.sort(
            key=lambda row: (
                MODES.index(row["mode"]),
                order[row["provider"].removesuffix(GRAPH)],
                row["provider"],
            )
        )
        torch.compiler.reset()
        return self.outcome

    # --- before the clock -----------------------------------------------------------------------------------

    def _leave_out(self, provider: str, reason: str, mode: str | None = None) -> None:
        self.outcome.leave_out(self.case, reason, provider, mode)
        self.options.say(f"  {provider} left out: {reason}")

    def _faster_planes(self) -> str:
        """The grouped convolution's better memory order here, tried in the heaviest mode asked for."""
        if self.case.name == "modulate" or not any(name.startswith("grouped_conv") for name in self.names):
            return PLANES
        taken: dict[str, float] = {}
        for planes in (PLANES, CHANNELS_LAST):
            provider = self._planes_provider(planes)
            try:
                call = call_of(provider, max(self.modes, key=MODES.index))
                once = partial(call, provider.adapt(self.sets[0]))
                once()
                taken[planes] = self.clock.time(once)
            except Exception as error:  # the check will meet and report it again
                self.options.say(f"  grouped_conv, {planes}: {reason_of(error)}")
            once = None
            release(self.options.device)
        return min(taken, key=lambda planes: taken[planes], default=PLANES)

    def _planes_provider(self, planes: str) -> Provider:
        return build("grouped_conv", self.options.device, self.case.dtype, planes)

    def _prepare(
        self, name: str, planes: str, contenders: dict[str, list[Contender]], reserve: float
    ) -> None:
        options, case = self.options, self.case
        provider = self._build(name, planes)
        if provider.unavailable is not None:
            self._leave_out(name, f"unavailable: {provider.unavailable}")
            return
        if options.budget.left() <= 0:
            self._leave_out(name, SPENT)
            return
        if provider.compiled and not options.budget.allows_compiling(case, reserve):
            expected = options.budget.compile_seconds(case)
            self._leave_out(name, f"compiling it (about {expected:.0f} s) does not fit the time budget")
            return
        if provider.compiled and (fault := options.compiler_fault(options.device)) is not None:
            self._leave_out(name, f"unavailable: {fault}")
            return
        first_calls = 0.0
        for mode in self.modes:
            start = time.perf_counter()
            try:
                verdict = self.checker.check(provider, mode)
                self.clock.synchronize()
                first = time.perf_counter() - start
                first_calls += first
                if verdict.ok:
                    contenders[mode] += self._warm(provider, mode, verdict, first)
                else:
                    self._failed(provider, mode, verdict, f"check failed: {verdict}")
            except Exception as error:  # a rival's compiler or a kernel: reported, and the others go on
                self._failed(provider, mode, None, reason_of(error))
        if provider.compiled:
            options.budget.compiled[case.family] = first_calls

    def _warm(self, provider: Provider, mode: str, verdict: Verdict, first_call: float) -> list[Contender]:
        call = call_of(provider, mode)
        adapted = [provider.adapt(problem) for problem in self.sets]
        entry = Entry(provider.name, rotating(call, adapted))
        self.clock.prepare(entry)
        peak, kept = self._memory(provider, call, adapted[0])
        ready = [Contender(provider, entry, verdict, peak, first_call, kept)]
        fused = provider.compiled or provider.name in ("triton", "cuda")
        if self.clock.cuda and fused and worth_capturing(self.case, mode):
            try:
                graph = self._capture(call, adapted)
                graph.name = provider.name + GRAPH
                ready.append(Contender(provider, graph, verdict, None, first_call))
            except Exception as error:
                self._leave_out(provider.name + GRAPH, reason_of(error), mode)
        return ready

    def _capture(self, call: Callable[[Problem], object], adapted: list[Problem]) -> Entry:
        """The call as a graph, once for each input set, its result compared with the call's own.

        The strengths are zeroed in place meanwhile: the graph reads them where they lie, and noise drawn anew
        differs.
        """
        results: list[object] = []
        calls: list[Call] = [lambda p=problem: results.append(call(p)) for problem in adapted]
        graph = captured(calls)
        results = results[-len(calls) :]
        first = adapted[0]
        kept = [t.detach().clone() for t in first.strengths]
        with torch.no_grad():
            for t in first.strengths:
                t.zero_()
        graph.call()
        replayed, direct = _comparable(results[0], first), _comparable(call(first), first)
        error = relative_error(replayed, direct)
        with torch.no_grad():
            for t, value in zip(first.strengths, kept):
                t.copy_(value)
        if not error < 1e-3:
            raise RuntimeError(
                f"a replayed graph differs from the call it captured, relative error {error:.1e}"
            )
        self.clock.prepare(graph)
        return graph

    # --- the clock ------------------------------------------------------------------------------------------

    def _time(self, mode: str, contenders: list[Contender], seconds: float) -> None:
        options = self.options
        ceilings = self.ceilings.entries(self.case.dtype)
        for entry in ceilings:
            entry.call()
        take_turns(
            [*ceilings, *(c.entry for c in contenders)],
            self.clock,
            rounds=options.rounds,
            least=options.least_rounds,
            seconds=seconds,
            progress=partial(options.progress, f"{self.case}, {mode}"),
        )
        rates = self.ceilings.record(ceilings)
        for contender in contenders:
            self.outcome.rows.append(self._row(mode, contender, rates))

    def _head(self, provider: str, mode: str) -> dict:
        case = self.case
        return {
            "case": case.name,
            "provider": provider,
            "mode": mode,
            "dtype": case.dtype_name,
            "batch": case.batch,
            "height": case.height,
            "width": case.width,
            "channels": case.widths[-1],
            "layers": case.layers,
        }

    def _row(self, mode: str, contender: Contender, rates: dict[str, float]) -> dict:
        case, entry, verdict = self.case, contender.entry, contender.verdict
        ms = entry.median
        tflops = case.flops(mode) / ms * 1e-9
        bound = self.ceilings.name(COPY if case.name == "modulate" else MATMUL, case.dtype)
        reached = case.bytes_moved(mode) / ms * 1e-6 if case.name == "modulate" else tflops
        return self._head(entry.name, mode) | {
            "ms": ms,
            "ms_p20": entry.percentile(0.2),
            "ms_p80": entry.percentile(0.8),
            "tflops": tflops,
            "of_ceiling": reached / rates[bound],
            "peak_mb": None if contender.peak is None else contender.peak / MIB,
            "error": verdict.error,
            "error_eager": verdict.error_eager,
            "ok": True,
            "error_eager_measured": verdict.measured_eager,
            "worst": verdict.quantity,
            "ceiling": bound,
            "ceiling_rate": rates[bound],
            "layout": contender.provider.layout,
            "samples": len(entry.samples),
            "calls_per_sample": entry.repeats * entry.calls,
            "first_call_s": contender.first_call,
        }

    def _failed(self, provider: Provider, mode: str, verdict: Verdict | None, reason: str) -> None:
        nothing = dict.fromkeys(("ms", "ms_p20", "ms_p80", "tflops", "of_ceiling", "peak_mb"))
        finite = verdict is not None and verdict.error < float("inf")
        self.outcome.rows.append(
            self._head(provider.name, mode)
            | nothing
            | {
                "error": verdict.error if finite else None,
                "error_eager": None if verdict is None else verdict.error_eager,
                "ok": False,
                "worst": None if verdict is None else verdict.quantity,
                "reason": reason,
            }
        )
        self.options.say(f"  {provider.name} FAILED ({mode}): {reason}")


def _comparable(result: object, problem: Problem) -> list[torch.Tensor]:
    """A call's tensors, less the strengths' gradients: sums of noise that is drawn anew."""
    if isinstance(result, torch.Tensor):
        return [result]
    strengths = {id(t) for t in problem.strengths}
    output, *grads = result
    return [output, *(g for g, leaf in zip(grads, problem.leaves, strict=True) if id(leaf) not in strengths)]
