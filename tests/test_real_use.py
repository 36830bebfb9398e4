"""The losses within what wraps, repeats, copies, divides and interrupts a training."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import multiprocessing
import os
import pickle
import queue
import random
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import (
    LOSSES,
    SMOOTH,
    Member,
    assert_close,
    inputs_of,
    loss_named,
    oracle,
    random_logits,
    random_valid,
    value_and_gradient,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maxsquare import IWMaxSquareLoss, MaxSquareLoss, MultiLevelLoss
from maxsquare.engine import cpu

each_loss = pytest.mark.parametrize("member", LOSSES, ids=repr)
# Pixels without classes, weights of classes, a threshold, and two heads.
NAMES = ("max_square", "iw_entropy", "pseudo_label", "iw_multi_level")
KINDS = [loss_named(name) for name in NAMES]
each_kind = pytest.mark.parametrize("member", KINDS, ids=repr)
each_size = pytest.mark.parametrize("size", [None, (9, 11)], ids=["as is", "upsampled"])
forks = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")
# Of Python 3.12, about forks beside threads.
may_fork = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Network(nn.Module):
    """Two heads of four classes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Conv2d(3, 6, 3, padding=1)
            self.heads = nn.ModuleList(nn.Conv2d(6, 4, 1) for _ in "ab")

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.body(images).relu()
        return [4 * head(x) for head in self.heads]


def images(count: int = 2) -> Tensor:
    return random_logits((count, 3, 5, 6), seed=7)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def assert_same_bits(results: Any, expected: Any) -> None:
    assert len(results) == len(expected) > 0
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


# Precision


@each_kind
@each_size
def test_autocast_gives_half_precision_logits_a_loss_in_float32(
    member: Member, size: tuple[int, int] | None, device: torch.device
) -> None:
    network, loss = Network().to(device), partial(member.make(), size=size)
    results = []
    for inside in (True, False):
        network.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            heads = network(images().float().to(device))[: member.heads]
            value = loss(*heads) if inside else None
        value = loss(*heads) if value is None else value
        value.backward()
        results.append([value.detach(), *gradients(network)])
    assert heads[0].dtype == torch.bfloat16 and value.dtype == torch.float32
    assert_same_bits(*results)
    assert all(gradient.isfinite().all() for gradient in results[0])
    exact = oracle(member, tuple(head.detach().double().cpu() for head in heads), size=size)
    assert_close(value.detach().cpu(), exact, torch.float32)


@each_kind
@each_size
def test_a_grad_scaler_changes_no_bit_of_a_step(
    member: Member, size: tuple[int, int] | None, device: torch.device
) -> None:
    parameters = []
    for enabled in (True, False):
        network = Network().to(device)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        # A power of two, as always: to multiply by it rounds nothing.
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=enabled)
        for _ in range(3):
            optimizer.zero_grad()
            heads = network(images().float().to(device))[: member.heads]
            scaler.scale(member.make()(*heads, size=size)).backward()
            scaler.step(optimizer)
            scaler.update()
        parameters.append([p.detach() for p in network.parameters()])
    assert_same_bits(*parameters)
    assert not all(map(torch.equal, parameters[0], Network().to(device).parameters()))


@each_kind
@each_size
def test_a_grad_scaler_skips_the_step_of_logits_that_overflow(
    member: Member, size: tuple[int, int] | None, device: torch.device
) -> None:
    network = Network().to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    scales, moved = [], []
    for factor in (1, 1e6, 1):
        before = [p.detach().clone() for p in network.parameters()]
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            heads = network(factor * images().float().to(device))[: member.heads]
        assert heads[0].dtype == torch.float16 and heads[0].isfinite().all() == (factor == 1)
        scaler.scale(member.make()(*heads, size=size)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not all(map(torch.equal, before, network.parameters())))
    assert scales == [2.0**10, 2.0**9, 2.0**9] and moved == [True, False, True]


# Graphs


@each_kind
@each_size
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("what", ["loss", "network and loss"])
def test_a_checkpoint_changes_no_bit(
    member: Member, size: tuple[int, int] | None, use_reentrant: bool, what: str
) -> None:
    network, loss = Network().double(), partial(member.make(), size=size)

    def all_at_once(x: Tensor) -> Tensor:
        return loss(*network(x)[: member.heads])

    x = images().requires_grad_()
    all_at_once(x).backward()
    expected = [x.grad, *gradients(network)]
    network.zero_grad()
    x = images().requires_grad_()
    again = partial(checkpoint, use_reentrant=use_reentrant)
    value = again(all_at_once, x) if what != "loss" else again(loss, *network(x)[: member.heads])
    value.backward()
    assert_same_bits([x.grad, *gradients(network)], expected)


@pytest.mark.parametrize("member", SMOOTH, ids=repr)
def test_accumulated_means_of_parts_alike_are_the_mean_of_the_whole(member: Member) -> None:
    network, loss = Network().double(), member.make()
    loss(*network(images(4))[: member.heads]).backward()
    expected = gradients(network)
    network.zero_grad()
    for part in images(4).split(2):
        (loss(*network(part)[: member.heads]) / 2).backward()
    for one, other in zip(gradients(network), expected, strict=True):
        assert_close(one, other)


def test_accumulated_sums_over_their_count_are_the_mean_of_the_whole() -> None:
    network, valid = Network().double(), random_valid((4, 5, 6), share=0.5)
    valid[0] = False
    MaxSquareLoss()(network(images(4))[0], valid=valid).backward()
    expected = gradients(network)
    network.zero_grad()
    for part, counted in zip(images(4).split(1), valid.split(1), strict=True):
        (MaxSquareLoss(reduction="sum")(network(part)[0], valid=counted) / valid.sum()).backward()
    for one, other in zip(gradients(network), expected, strict=True):
        assert_close(one, other)


@each_loss
@each_size
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_value_is_the_same_and_nothing_is_kept(
    member: Member, size: tuple[int, int] | None, mode: Callable[[], Any]
) -> None:
    loss, inputs = partial(member.make(), size=size), inputs_of(member)
    expected = loss(*inputs)
    with mode():
        value = loss(*inputs)
        assert not value.requires_grad
        # Gradients may be wanted within, as of a network that is adapted while it predicts.
        with torch.inference_mode(False), torch.enable_grad():
            within = loss(*inputs)
    assert torch.equal(value, expected)
    assert_same_bits(
        *(torch.autograd.grad(each, inputs, allow_unused=True)[-1:] for each in (within, expected))
    )


@each_kind
@each_size
def test_a_retained_graph_gives_the_same_gradient_until_it_is_freed(
    member: Member, size: tuple[int, int] | None
) -> None:
    network = Network().double()
    value = member.make()(*network(images())[: member.heads], size=size)
    value.backward(retain_graph=True)
    once = gradients(network)
    value.backward()
    assert_same_bits(gradients(network), [2 * gradient for gradient in once])
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@each_size
def test_losses_of_one_tensor_add_up(size: tuple[int, int] | None) -> None:
    z = random_logits((2, 4, 5, 6)).requires_grad_()
    y = torch.zeros(2, *(size or (5, 6)), dtype=torch.long)
    losses: list[Callable[[Tensor], Tensor]] = [
        partial(MaxSquareLoss(), size=size),
        partial(IWMaxSquareLoss(), size=size),
        lambda z: F.cross_entropy(F.interpolate(z, size or (5, 6), mode="bilinear"), y),
    ]
    separate = [torch.autograd.grad(loss(z), z)[0] for loss in losses]
    logits = z * 1
    first, second, third = (loss(logits) for loss in losses)
    (together,) = torch.autograd.grad(first + second + third, z, retain_graph=True)
    assert_close(together, torch.stack(separate).sum(0))
    for value in (third, first, second):
        value.backward(retain_graph=True)
    assert_close(z.grad, together)


# Hooks


@each_kind
@each_size
def test_hooks_of_a_module_see_and_replace_what_passes(
    member: Member, size: tuple[int, int] | None
) -> None:
    loss, inputs = member.make(), inputs_of(member)
    expected, slopes = value_and_gradient(partial(loss, size=size), inputs)
    seen: dict[str, Any] = {}
    loss.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(pre=(args, kwargs)), with_kwargs=True
    )
    loss.register_forward_hook(lambda _, args, value: 2 * value)
    loss.register_full_backward_pre_hook(lambda _, upstream: (3 * upstream[0],))

    def scale(_: nn.Module, inner: tuple[Tensor | None, ...], upstream: Any) -> Any:
        seen.update(inner=inner, upstream=upstream)
        return tuple(None if gradient is None else 5 * gradient for gradient in inner)

    loss.register_full_backward_hook(scale)
    value, hooked = value_and_gradient(partial(loss, size=size), inputs)
    assert torch.equal(value, 2 * expected)
    assert len(seen["pre"][0]) == member.heads and seen["pre"][1] == {"size": size}
    # Within the hook on the value, its own factor is not seen.
    assert seen["upstream"][0] in (3, 6)
    assert_close(hooked[-1], 30 * slopes[-1])
    assert_close(5 * seen["inner"][-1], hooked[-1])


@each_size
def test_hooks_of_tensors_are_called_once(size: tuple[int, int] | None) -> None:
    network, loss = Network().double(), MultiLevelLoss(IWMaxSquareLoss())
    logits, low_logits = network(images())
    logits.retain_grad()
    seen: list[tuple[str, Any]] = []
    torch.autograd.graph.register_multi_grad_hook(
        (logits, low_logits), lambda grads: seen.append(("all", [g.clone() for g in grads]))
    )

    def step(parameter: Tensor) -> None:
        """As an optimiser that steps within the backward pass."""
        seen.append(("step", parameter.grad))
        parameter.grad = None

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    loss(logits, low_logits, size=size).backward()
    names = [name for name, _ in seen]
    assert names.count("all") == 1 and names.count("step") == 6
    assert torch.equal(logits.grad, dict(seen)["all"][0])
    assert not gradients(network)


# Copies


def saved(loss: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(loss, stream)
    stream.seek(0)
    restored: nn.Module = torch.load(stream, weights_only=False)
    return restored


@each_loss
@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss)), saved],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_a_copy_of_a_module_is_its_twin(
    member: Member, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    loss = member.make(reduction="sum", activation="sigmoid")
    inputs = inputs_of(member)
    expected, slopes = value_and_gradient(loss, inputs)
    twin = duplicate(loss.eval())
    assert repr(twin) == repr(loss) and not twin.training and twin is not loss
    value, same = value_and_gradient(twin, inputs)
    assert torch.equal(value, expected)
    assert_same_bits(same, slopes)
    # Of options that are changed afterwards, the other does not know.
    if isinstance(twin, MultiLevelLoss) and duplicate is not copy.copy:
        twin = twin.target_loss
        assert twin is not loss.target_loss
    twin.reduction = "none"
    assert getattr(loss, "target_loss", loss).reduction == "sum" or duplicate is copy.copy


def test_a_network_with_its_loss_inside_is_copied_and_saved() -> None:
    network = nn.ModuleDict({"network": Network(), "loss": IWMaxSquareLoss(ratio=0.5)})
    twin = copy.deepcopy(network)
    assert set(network.state_dict()) == {f"network.{name}" for name in Network().state_dict()}
    twin.load_state_dict(network.state_dict())
    x = images().float()
    values = [each["loss"](each["network"](x)[0]) for each in (network, twin, saved(network))]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    half = network.half()["loss"]
    assert half.ratio == 0.5


# Threads


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Helpers of every call, whatever the machine has."""
    before, cpus = torch.get_num_threads(), os.cpu_count
    torch.set_num_threads(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: max(3, cpus() or 1))
        yield
    torch.set_num_threads(before)


Case = tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, tuple[Tensor, ...]]]


def cases() -> list[Case]:
    """Losses of float32 logits with work for several threads, and what they give."""
    result: list[Case] = []
    for member in KINDS:
        for size, shape in ((None, (2, 19, 97, 85)), ((160, 150), (2, 19, 9, 11))):
            inputs = tuple(x.detach() for x in inputs_of(member, shape, dtype=torch.float32))
            loss = partial(member.make(), size=size)
            result.append((loss, inputs, value_and_gradient(loss, inputs)))
    return result


def is_right(case: Case, value: Tensor, slopes: tuple[Tensor | None, ...]) -> bool:
    """Bit for bit, and without PyTorch's parallel operations, which a forked process lacks."""
    _, _, (expected, expected_slopes) = case
    pairs = [(value.detach(), expected)]
    for slope, other in zip(slopes, expected_slopes, strict=True):
        pairs.append((torch.zeros(other.shape) if slope is None else slope, other))
    return all(one.numpy().tobytes() == other.numpy().tobytes() for one, other in pairs)


def compute(case: Case) -> bool:
    loss, inputs, _ = case
    return is_right(case, *value_and_gradient(loss, inputs))


def train_in_threads(all_cases: list[Case], seconds: float, pairs: int = 3) -> int:
    """How many losses some threads computed, and others led back through their graphs."""
    graphs: queue.Queue[Any] = queue.Queue(2 * pairs)
    end = time.monotonic() + seconds

    def forward(seed: int) -> int:
        torch.set_num_threads(3)
        chosen, count = random.Random(seed), 0
        while count < len(all_cases) or time.monotonic() < end:
            case = all_cases[chosen.randrange(len(all_cases))]
            leaves = tuple(x.detach().requires_grad_() for x in case[1])
            graphs.put((case, leaves, case[0](*leaves)), timeout=120)
            count += 1
        graphs.put(None, timeout=120)
        return count

    def backward(_: int) -> int:
        torch.set_num_threads(3)
        count = 0
        while item := graphs.get(timeout=120):
            case, leaves, value = item
            assert is_right(case, value, torch.autograd.grad(value, leaves, allow_unused=True))
            count += 1
        return count

    with ThreadPoolExecutor(2 * pairs) as pool:
        computed = [pool.submit(forward, k) for k in range(pairs)]
        led_back = [pool.submit(backward, k) for k in range(pairs)]
        total = sum(each.result() for each in computed)
        assert total == sum(each.result() for each in led_back)
    return total


def test_threads_lead_back_what_other_threads_computed(three_threads: None) -> None:
    assert train_in_threads(cases(), 1) >= 24


def test_a_system_without_another_thread_computes_alone(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_cases = cases()
    cpu.start_anew()

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert all(map(compute, all_cases))
    assert not cpu.HELPERS.threads and cpu.HELPERS.calls.empty()


# Processes


def finish_in_fork(work: Callable[..., Any], *arguments: Any) -> None:
    """Have a forked process do it, which has to end by itself, in time, and without an error."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0


def compute_all(all_cases: list[Case]) -> None:
    torch.set_num_threads(3)
    assert all(map(compute, all_cases))


@forks
@may_fork
def test_processes_forked_while_threads_compute_get_the_same_bits(three_threads: None) -> None:
    fork_while_threads_compute(1, 3)


def fork_while_threads_compute(seconds: float, processes: int) -> int:
    all_cases = cases()
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train_in_threads, all_cases, seconds, 2)
        forked = 0
        while forked < processes or time.monotonic() < end:
            finish_in_fork(compute_all, all_cases)
            forked += 1
        training.result()
    return forked


def go_on_alone(case: Case, sender: Any) -> None:
    """A thread that computes on when the main thread has nothing more to do."""
    main = threading.current_thread()

    def go_on() -> None:
        torch.set_num_threads(3)
        cpu.start_anew()
        while main.is_alive():
            time.sleep(0.01)
        sender.send([compute(case), compute(case), bool(cpu.HELPERS.threads)])

    threading.Thread(target=go_on).start()


@forks
@may_fork
def test_a_thread_computes_on_after_the_main_thread(three_threads: None) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # Python ends its pools of threads with the main thread.
    finish_in_fork(go_on_alone, cases()[0], sender)
    assert receiver.poll(0) and receiver.recv() == [True] * 3


def interrupt(all_cases: list[Case], times: int) -> None:
    torch.set_num_threads(3)
    moments = random.Random(0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for _ in range(times):
        # The first call starts threads: that is interrupted too.
        cpu.start_anew()
        with contextlib.suppress(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-5, 5e-3))
            # Python drops an interrupt that hits a destructor, so this must end without one.
            end = time.monotonic() + 0.1
            while time.monotonic() < end:
                compute(all_cases[moments.randrange(len(all_cases))])
        assert compute(all_cases[moments.randrange(len(all_cases))])
    # At the end of the process nothing may wait for a thread that was interrupted.


@forks
@may_fork
def test_an_interrupted_call_leaves_the_next_right_and_the_end_at_once(three_threads: None) -> None:
    finish_in_fork(interrupt, cases(), 60)


def compute_in_handler(all_cases: list[Case], seconds: float) -> None:
    torch.set_num_threads(3)
    moments, within = random.Random(0), []
    end = time.monotonic() + seconds

    def handle(*_: object) -> None:
        # The value alone: within an operator PyTorch makes no graph.
        loss, inputs, (expected, _) = all_cases[0]
        within.append(loss(*inputs).numpy().tobytes() == expected.numpy().tobytes())
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-5, 3e-3))

    signal.signal(signal.SIGALRM, handle)
    handle()
    while time.monotonic() < end:
        assert all(map(compute, all_cases))
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(within) > 10 and all(within)


@forks
@may_fork
def test_a_signal_may_compute_a_loss_within_a_loss(three_threads: None) -> None:
    finish_in_fork(compute_in_handler, cases()[::3], 1)


def learn_from_shared(loss: nn.Module, logits: Tensor, slope: Tensor) -> None:
    _, (gradient,) = value_and_gradient(loss, (logits,))
    slope.copy_(gradient)


@forks
@may_fork
def test_logits_in_memory_that_processes_share_are_taken() -> None:
    loss, logits = IWMaxSquareLoss(), random_logits((2, 3, 4, 5)).share_memory_()
    slope = torch.zeros_like(logits).share_memory_()
    finish_in_fork(learn_from_shared, loss, logits, slope)
    assert_same_bits([slope], value_and_gradient(loss, (logits,))[1])


class Scored(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Logits with the loss that the loader's process computed of them."""

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        logits = random_logits((1, 19, 65, 61), seed=index).float()
        value, (slope,) = value_and_gradient(partial(self.loss, size=(130, 122)), (logits,))
        return value, slope


@forks
@may_fork
def test_a_worker_of_a_data_loader_computes_losses(three_threads: None) -> None:
    dataset = Scored(MaxSquareLoss())
    expected = [dataset[index] for index in range(4)]
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    for one, other in zip(loader, expected, strict=True):
        assert_same_bits(one, other)


# Several processes train one network

RANKS = 2
# Every rank's valid pixels, in very different numbers.
SHARES = (0.1, 0.9)


HAS_FSDP = hasattr(torch.cpu.Stream, "record_event")
each_wrapper = pytest.mark.parametrize(
    "wrapper",
    [
        "DDP",
        pytest.param(
            "FSDP",
            marks=pytest.mark.skipif(not HAS_FSDP, reason="PyTorch 2.6 has no FSDP2 on CPUs"),
        ),
    ],
)
Results = dict[str, list[Tensor]]


def masks() -> list[Tensor]:
    return [random_valid((2, 5, 6), seed=rank, share=share) for rank, share in enumerate(SHARES)]


def train_on_rank(rank: int, folder: str) -> None:
    """What a process of two finds out, each with images and a mask of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    x, valid = images(2 * RANKS).chunk(RANKS)[rank], masks()[rank]

    def mean(network: nn.Module) -> Tensor:
        return MaxSquareLoss()(network(x)[0], valid=valid)

    def sum_over_count(network: nn.Module) -> Tensor:
        counted = valid.sum().double()
        dist.all_reduce(counted)
        loss = MaxSquareLoss(reduction="sum")(network(x)[0], valid=valid)
        return loss * dist.get_world_size() / counted

    def image_wise(network: nn.Module) -> Tensor:
        return MultiLevelLoss(IWMaxSquareLoss(), threshold=0)(*network(x), size=(9, 11))

    results: Results = {}
    for loss in (mean, sum_over_count, image_wise):
        network = Network().double()
        whole = nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
        loss(whole).backward()
        results[f"DDP {loss.__name__}"] = gradients(network)
        if not HAS_FSDP:
            continue
        network = Network().double()
        mesh = init_device_mesh("cpu", (RANKS,))
        fully_shard(network.body, mesh=mesh)
        loss(fully_shard(network, mesh=mesh)).backward()
        results[f"FSDP {loss.__name__}"] = [g.full_tensor() for g in gradients(network)]
    z = random_logits((1, 19, 7, 9)).float()
    value, slopes = value_and_gradient(IWMaxSquareLoss(), (z,))
    results["alone"] = [value, *slopes]
    torch.save(results, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(train_on_rank, (str(folder),), RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_a_spawned_process_computes_the_same_bits(ranks: list[Results]) -> None:
    value, slopes = value_and_gradient(IWMaxSquareLoss(), (random_logits((1, 19, 7, 9)).float(),))
    for results in ranks:
        assert_same_bits(results["alone"], [value, *slopes])


@each_wrapper
def test_several_processes_learn_from_the_mean_of_their_means(
    ranks: list[Results], wrapper: str
) -> None:
    member, expected = loss_named("max_square"), Network().double()
    parts = zip(images(2 * RANKS).chunk(RANKS), masks(), strict=True)
    sum(oracle(member, (expected(x)[0],), valid=v) / RANKS for x, v in parts).backward()
    pooled = Network().double()
    oracle(member, (pooled(images(2 * RANKS))[0],), valid=torch.cat(masks())).backward()
    for results in ranks:
        for one, other, whole in zip(
            *(results[f"{wrapper} mean"], gradients(expected), gradients(pooled)), strict=True
        ):
            assert_close(one, other)
            # That is not the mean over the pixels of all.
            assert (one - whole).abs().max() > 0.1 * whole.abs().max()


@each_wrapper
def test_a_sum_over_the_pixels_counted_in_all_processes_is_their_mean(
    ranks: list[Results], wrapper: str
) -> None:
    pooled = Network().double()
    z = pooled(images(2 * RANKS))[0]
    oracle(loss_named("max_square"), (z,), valid=torch.cat(masks())).backward()
    for results in ranks:
        for one, other in zip(results[f"{wrapper} sum_over_count"], gradients(pooled), strict=True):
            assert_close(one, other)


@each_wrapper
def test_image_wise_losses_of_as_many_images_each_are_those_of_the_whole_batch(
    ranks: list[Results], wrapper: str
) -> None:
    network = Network().double()
    loss = MultiLevelLoss(IWMaxSquareLoss(), threshold=0)
    loss(*network(images(2 * RANKS)), size=(9, 11)).backward()
    for results in ranks:
        for one, other in zip(results[f"{wrapper} image_wise"], gradients(network), strict=True):
            assert_close(one, other)


# Memory


@each_loss
@each_size
def test_a_graph_goes_with_its_last_reference(member: Member, size: tuple[int, int] | None) -> None:
    """Not with the next collection of garbage, until which its logits would fill the memory."""
    loss = partial(member.make(), size=size)
    gc.disable()
    try:
        for used in (False, True):
            heads = [x * 1 for x in inputs_of(member)]
            logits = [weakref.ref(x) for x in heads]
            value = loss(*heads)
            if used:
                value.backward()
            del value, heads
            assert not any(reference() is not None for reference in logits)
    finally:
        gc.enable()


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def grow(all_cases: list[Case], calls: int) -> tuple[int, int, int]:
    """Memory, objects and threads that this many calls add to those of the first ones."""
    before = (0, 0, 0)
    for k in range(-2 * len(all_cases), calls):
        if k == 0:
            before = (resident_kib(), len(gc.get_objects()), threading.active_count())
        loss, inputs, _ = all_cases[k % len(all_cases)]
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        value = loss(*leaves)
        # Of some the graph is never used.
        if k % 5:
            value.backward()
    after = (resident_kib(), len(gc.get_objects()), threading.active_count())
    memory, objects, threads = (b - a for a, b in zip(before, after, strict=True))
    return memory, objects, threads


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory as Linux tells it")
def test_calls_leave_neither_memory_nor_objects_nor_threads(three_threads: None) -> None:
    memory, objects, threads = grow(cases(), 200)
    # A call of these holds 3 MiB.
    assert memory < 6 * 1024 and objects < 100 and threads == 0


# Long forms


@pytest.mark.stress
def test_threads_and_forked_processes_for_long(
    three_threads: None, stress_budget: Callable[[float], float]
) -> None:
    assert train_in_threads(cases(), stress_budget(10), 4)
    assert fork_while_threads_compute(stress_budget(10), 1)


@pytest.mark.stress
@forks
@may_fork
def test_interrupts_for_long(three_threads: None, stress_budget: Callable[[float], float]) -> None:
    finish_in_fork(interrupt, cases(), round(stress_budget(500)))
    finish_in_fork(compute_in_handler, cases(), stress_budget(10))


@pytest.mark.stress
def test_memory_for_long(three_threads: None, stress_budget: Callable[[float], float]) -> None:
    memory, objects, threads = grow(cases(), round(stress_budget(8_000)))
    assert memory < 0.02 * resident_kib() and objects < 100 and threads == 0
