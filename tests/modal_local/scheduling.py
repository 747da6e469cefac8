"""When containers start and stop, and what becomes of inputs that did not succeed."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from typing import Any

from modal_proto import api_pb2 as pb

from . import containers
from .logs import write_log
from .state import (
    FAILURE,
    TERMINATED,
    TIMEOUT,
    App,
    Call,
    ControlPlane,
    Fn,
    Input,
    Result,
    Task,
    new_id,
)

SERVER_WANTED = 5.0  # seconds a refused request keeps a container of a server wanted
STOP_GRACE = 5.0


def reconcile(plane: ControlPlane, fn: Fn) -> None:
    """Start containers until the queue fits, or a limit binds."""
    if fn.definition is None or plane.stopping or (fn.app.done and not fn.queue):
        return
    if fn.definition.is_server:
        _reconcile_server(plane, fn)
        return
    while _wants_container(plane, fn):
        start_task(plane, fn)


def _wants_container(plane: ControlPlane, fn: Fn) -> bool:
    live = [task for task in fn.tasks.values() if not task.draining and not task.killing]
    if fn.definition.single_use_containers:
        room = sum(1 for task in live if not task.fetched)
    else:
        room = sum(max(0, fn.concurrency - len(task.running)) for task in live)
    if len(fn.queue) <= room and len(live) >= floor(fn):
        return False
    cap = fn.setting("max_containers", "concurrency_limit") or math.inf
    return len(live) < cap and _fits(plane, fn)


def _fits(plane: ControlPlane, fn: Fn) -> bool:
    if len(plane.tasks) >= plane.options.max_containers:
        return False
    used = sum(task.fn.gpus for task in plane.tasks.values())
    return not used or used + fn.gpus <= plane.options.gpus


def floor(fn: Fn) -> int:
    """Return how many containers stay up without work."""
    return int(fn.setting("min_containers", "warm_pool_size")) if fn.current else 0


def _reconcile_server(plane: ControlPlane, fn: Fn) -> None:
    live = [task for task in fn.tasks.values() if not task.draining and not task.killing]
    inflight = sum(fn.inflight.values())
    target = fn.setting("target_concurrency_float") or fn.setting("target_concurrency")
    want = math.ceil(inflight / target) if target else min(1, inflight)
    if time.time() - fn.wanted_at < SERVER_WANTED:
        want = max(want, 1)
    cap = fn.setting("max_containers") or plane.options.max_containers
    want = int(max(floor(fn), min(want, cap))) if fn.current else 0
    for _ in range(want - len(live)):
        if _fits(plane, fn):
            start_task(plane, fn)
    window = min(fn.setting("scaledown_window") or 60.0, plane.options.max_idle)
    idle = [
        task
        for task in live
        if task.ready and not fn.inflight[task.id] and time.time() - task.idle_since > window
    ]
    for task in idle[: max(0, len(live) - want)]:
        task.draining = True
        containers.send_signal(plane, task, signal.SIGTERM)


def start_task(plane: ControlPlane, fn: Fn) -> None:
    """Start one container."""
    identity = new_id("ta")
    task = Task(identity, fn, plane.dir / "tasks" / identity)
    fn.tasks[task.id] = plane.tasks[task.id] = task
    fn.started += 1
    plane.containers_started += 1
    plane.spawn(_life(plane, task))


async def _life(plane: ControlPlane, task: Task) -> None:
    status = await containers.run(plane, task)
    plane.tasks.pop(task.id, None)
    task.fn.tasks.pop(task.id, None)
    task.fn.inflight.pop(task.id, None)
    if not plane.stopping:
        _after_exit(plane, task, status)
        for fn in [fn for fn in plane.fns.values() if fn.queue or fn is task.fn]:
            reconcile(plane, fn)


def _after_exit(plane: ControlPlane, task: Task, status: int) -> None:
    """Decide about the inputs a container left behind."""
    limit = plane.options.crash_retries
    for item in list(task.running.values()):
        task.running.pop(item.id)
        if item.done:
            continue
        item.attempt += 1
        _stop_timer(item)
        if task.preempted:
            item.preemptions += 1
            requeue(plane, item)
            continue
        item.crashes += 1
        if item.crashes > limit:
            text = f"Input aborted - exceeded limit of {limit} retries"
            finish(
                plane,
                item,
                Result(status=Result.GENERIC_STATUS_INTERNAL_FAILURE, exception=text),
                task,
            )
        else:
            requeue(plane, item, 0.1)
    silent = not (task.init_error or task.killing or task.preempted or task.fetched)
    if status and silent and task.fn.queue:
        # It died before it took an input (a segfault at import): the oldest input pays for it.
        item = task.fn.queue[0]
        item.crashes += 1
        if item.crashes > limit:
            task.fn.queue.popleft()
            text = f"Container exited with code {status} before taking inputs"
            finish(
                plane,
                item,
                Result(status=Result.GENERIC_STATUS_INTERNAL_FAILURE, exception=text),
                task,
            )


def preempt(plane: ControlPlane, task: Task) -> None:
    """Interrupt a container; its inputs run again elsewhere without using a retry."""
    task.preempted = task.draining = True
    task.fn.arrived.fire()
    containers.send_signal(
        plane, task, signal.SIGINT, group=plane.options.preempt_target == "group"
    )
    loop = asyncio.get_running_loop()
    loop.call_later(plane.options.preempt_grace, containers.kill, plane, task)


def take(plane: ControlPlane, task: Task, count: int) -> list[Input]:
    """Hand the oldest inputs of the queue to a container."""
    fn = task.fn
    taken: list[Input] = []
    while fn.queue and len(taken) < count:
        item = fn.queue.popleft()
        item.task, item.started = task, time.time()
        item.starts += 1
        task.running[item.id] = item
        task.fetched += 1
        if fn.definition.timeout_secs:
            item.timer = asyncio.get_running_loop().call_later(
                fn.definition.timeout_secs, _on_timeout, plane, item, item.attempt
            )
        taken.append(item)
    return taken


def give_back(plane: ControlPlane, task: Task, item: Input) -> None:
    """Undo `take` for an input that did not reach its container."""
    if task.running.pop(item.id, None) is not None and not item.done:
        _stop_timer(item)
        item.starts -= 1
        task.fetched -= 1
        requeue(plane, item)


def requeue(plane: ControlPlane, item: Input, delay: float = 0.0) -> None:
    """Put an input back at the head of its queue."""

    def put() -> None:
        if not item.done and not plane.stopping:
            item.fn.queue.appendleft(item)
            item.fn.arrived.fire(1)
            reconcile(plane, item.fn)

    item.task = None
    delay *= plane.options.retry_delay_scale
    if delay:
        asyncio.get_running_loop().call_later(delay, put)
    else:
        put()


def complete(
    plane: ControlPlane, item: Input, result: Any, task: Task | None, data_format: int = 0
) -> None:
    """Take a result of a container or of the scheduler, and apply the retries of the function."""
    policy = item.fn.definition.retry_policy
    _stop_timer(item)
    if task:
        task.running.pop(item.id, None)
        task.idle_since = time.time()
    if result.status in (FAILURE, TIMEOUT) and item.user_retries < policy.retries:
        factor = (policy.backoff_coefficient or 1.0) ** item.user_retries
        seconds = min(policy.initial_delay_ms * factor, policy.max_delay_ms or 60_000) / 1000
        item.user_retries += 1
        item.attempt += 1
        requeue(plane, item, seconds)
    else:
        finish(plane, item, result, task, data_format)


def finish(
    plane: ControlPlane, item: Input, result: Any, task: Task | None = None, data_format: int = 0
) -> None:
    """Make a result final."""
    if item.done:
        return
    item.done = True
    _stop_timer(item)
    call = item.call
    call.unfinished -= 1
    call.outputs[item.index] = pb.FunctionGetOutputsItem(
        result=result,
        idx=item.index,
        input_id=item.id,
        data_format=data_format,  # type: ignore[arg-type]
        task_id=task.id if task else "",
        retry_count=item.attempt,
        input_started_at=item.started,
        output_created_at=time.time(),
    )
    call.order.append(item.index)
    call.finished.fire()
    if not call.unfinished:
        plane.finished.append((time.time() + plane.options.result_ttl, call))
    item.message = None


def expire(call: Call) -> None:
    """Drop the results of a call, as the service does after its retention period."""
    call.outputs.clear()
    call.expired = True
    call.finished.fire()


def _stop_timer(item: Input) -> None:
    if item.timer is not None:
        item.timer.cancel()
        item.timer = None


def _on_timeout(plane: ControlPlane, item: Input, attempt: int) -> None:
    task = item.task
    if item.done or item.attempt != attempt or task is None:
        return
    text = f"Task's current input {item.id} hit its timeout of {item.fn.definition.timeout_secs}s"
    drop_container(plane, task, item)
    complete(plane, item, Result(status=TIMEOUT, exception=text), task)


def drop_container(plane: ControlPlane, task: Task, guilty: Input) -> None:
    """Kill a container because of one input; its other inputs run again."""
    for other in list(task.running.values()):
        task.running.pop(other.id)
        if other is not guilty:
            other.attempt += 1
            _stop_timer(other)
            requeue(plane, other)
    containers.kill(plane, task)


def cancel(plane: ControlPlane, item: Input, terminate: bool) -> None:
    """Cancel an input: at once when it waits, or when its container is to go, else in there."""
    if item.done:
        return
    result = Result(status=TERMINATED, exception="Input was cancelled by user")
    task = item.task
    if task is None:
        if item in item.fn.queue:
            item.fn.queue.remove(item)
        finish(plane, item, result)
    elif terminate:
        finish(plane, item, result, task)
        drop_container(plane, task, item)
    else:
        task.cancelled.append(item.id)
        task.cancellation.fire()


def stop_app(plane: ControlPlane, app: App) -> None:
    """End an app: cancel what waits, interrupt what runs."""
    if app.done:
        return
    app.state, app.done, app.stopped = pb.APP_STATE_STOPPED, True, time.time()
    loop = asyncio.get_running_loop()
    for fn in app.functions:
        waiting = list(fn.queue)
        fn.queue.clear()
        for task in list(fn.tasks.values()):
            waiting += task.running.values()
            task.killing = True
            containers.send_signal(plane, task, signal.SIGINT)
            loop.call_later(STOP_GRACE, containers.kill, plane, task)
        for item in waiting:
            finish(plane, item, Result(status=TERMINATED, exception="App stopped"), item.task)
        fn.arrived.fire()
    app.logged.fire()


async def watch(plane: ControlPlane) -> None:
    """Do what no request triggers: idle containers, lost clients, old results."""
    while True:
        await asyncio.sleep(0.25)
        now = time.time()
        for app in list(plane.apps.values()):
            silent = now - app.last_heartbeat > plane.options.app_heartbeat_timeout
            if silent and app.state == pb.APP_STATE_EPHEMERAL and now > plane.down_until:
                write_log(app, "modal_local: client heartbeat lost, stopping the app\n")
                stop_app(plane, app)
        while plane.finished and plane.finished[0][0] <= now:
            expire(plane.finished.popleft()[1])
        for fn in list(plane.fns.values()):
            if fn.definition is None or (fn.app.done and not fn.tasks):
                continue
            if not fn.definition.is_server:
                _drain_idle(plane, fn, now)
            reconcile(plane, fn)


def drain_idle(plane: ControlPlane) -> None:
    """End every container that has nothing to do."""
    for task in plane.tasks.values():
        if task.ready and not task.running:
            task.draining = True
            task.fn.arrived.fire()


def _drain_idle(plane: ControlPlane, fn: Fn, now: float) -> None:
    window = fn.setting("scaledown_window", "task_idle_timeout_secs") or 60.0
    window = min(window, plane.options.max_idle)
    live = [task for task in fn.tasks.values() if not task.draining]
    idle = [task for task in live if not task.running and task.ready]
    for task in idle[: max(0, len(live) - floor(fn))]:
        if now - task.idle_since > window:
            task.draining = True
            fn.arrived.fire()
