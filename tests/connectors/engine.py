"""vLLM's own scheduler with our connector, real KV tensors, and no model.

What is real: `Scheduler` and its block pool, `KVConnectorFactory`, the connector on both sides
with its leader, workers, host slabs, NIXL agents and threads, the mixin that makes vLLM's
model runner call the connector (so that each release calls it in its own order), and
`KVOutputAggregator`. What stands in: the processes (scheduler and all ranks live in one), and
the forward pass (`computation.py`), which checks every byte that it would attend to.

All of it is built from the classes of whichever vLLM is installed. Its unit tests have such
functions, too, but only in the source distribution, and they change with every release.

    engine = Engine(blocks=32, slots=64)
    first = engine.ask(range(40))           # runs until nothing is left to do
    engine.forget_device()
    assert engine.ask(range(40)).loaded == 36
    engine.close()                          # fails if anything leaked
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVEventsConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    maybe_convert_block_hash,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvbm_connectors.vllm_events import MEDIA
from kvbm_connectors.vllm_layout import name_of
from kvbm_connectors.vllm_releases import LOST_REQUESTS
from kvbm_schemas.block import BlockHash, Tier
from kvbm_service.core.leader import Leader
from tests.connectors.computation import Text
from tests.connectors.rank import Rank

BLOCK = 4
"""Tokens per block."""
LAYERS = 2
PATIENCE_SECONDS = 30.0
"""No test waits longer for anything; none needs nearly as long."""
NOWHERE = "nats://127.0.0.1:1"

_numbers = count(1)


@dataclass(frozen=True)
class Shape:
    """What a test may choose about an engine."""

    blocks: int = 64
    """In the device pool; vLLM keeps one of them for itself."""
    slots: int = 64
    """In the host tier."""
    ranks: int = 1
    batch_tokens: int = 512
    """Tokens per step: fewer than a prompt has, and it is computed in chunks."""
    overlapping: bool = False
    """Asynchronous scheduling: a step is scheduled before the one before it has ended."""
    events: bool = False
    connector: str = "KvbmConnector"
    policy: str = "recompute"
    hashing: str = "sha256"
    nats: str = NOWHERE
    node: str = ""
    verify: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    specs: tuple[KVCacheSpec, ...] = ()
    """Of each KV cache group; empty: one group with full attention."""
    parallel: dict[str, Any] = field(default_factory=dict)


def full_attention() -> FullAttentionSpec:
    """What each layer's blocks are like."""
    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=4, dtype=torch.float32)


def sliding_window(tokens: int = 2 * BLOCK) -> SlidingWindowSpec:
    """The same for layers that see only the last `tokens`."""
    return SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=4, dtype=torch.float32, sliding_window=tokens
    )


def vllm_config(model: ModelConfig, shape: Shape) -> VllmConfig:
    """What the command line would have made of it."""
    extra = {
        "KVBM_NATS_URL": shape.nats,
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": shape.slots,
        "KVBM_NODE_NAME": shape.node,
        "KVBM_VERIFY": shape.verify,
        "KVBM_HOST_CACHE_DIR": "none",
    }
    transfer = KVTransferConfig(
        kv_connector=shape.connector,
        kv_connector_module_path="kvbm_connectors.vllm",
        kv_role="kv_both",
        kv_load_failure_policy=shape.policy,  # type: ignore[arg-type]
        kv_connector_extra_config=extra | shape.extra,
    )
    scheduling = SchedulerConfig(
        max_model_len=model.max_model_len,
        is_encoder_decoder=False,
        max_num_seqs=min(16, shape.batch_tokens),
        max_num_batched_tokens=shape.batch_tokens,
        enable_chunked_prefill=True,
        disable_hybrid_kv_cache_manager=not (shape.specs and LOST_REQUESTS.here),
        async_scheduling=shape.overlapping,
    )
    cache = CacheConfig(
        block_size=BLOCK,
        enable_prefix_caching=True,
        prefix_caching_hash_algo=shape.hashing,  # type: ignore[arg-type]
    )
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    return VllmConfig(
        model_config=model,
        scheduler_config=scheduling,
        cache_config=cache,
        parallel_config=ParallelConfig(tensor_parallel_size=shape.ranks, **shape.parallel),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=transfer,
        kv_events_config=events if shape.events else None,
    )


def kv_cache_config(shape: Shape) -> KVCacheConfig:
    """What vLLM would have found out about the model's layers."""
    groups = [
        KVCacheGroupSpec([f"group{g}.layer{i}" for i in range(LAYERS)], spec)
        for g, spec in enumerate(shape.specs or (full_attention(),))
    ]
    return KVCacheConfig(num_blocks=shape.blocks, kv_cache_tensors=[], kv_cache_groups=groups)


@dataclass
class Asked:
    """One request, and what became of it."""

    id: str
    request: Request
    text: Text
    answer: list[int] = field(default_factory=list)
    computed: int = 0
    """Positions that the forward pass computed, repetitions included."""
    loaded: int = 0
    """Tokens that the connector promised to load, when vLLM last accepted that."""
    finished: bool = False
    handed_over: dict[str, Any] | None = None
    """What the answer tells the engine that is to go on."""

    @property
    def names(self) -> list[BlockHash]:
        """Of its full blocks, the generated ones included."""
        return [name_of(block_hash) for block_hash in self.request.block_hashes]


class Engine:
    """One engine. Steps only when told to."""

    def __init__(self, model: ModelConfig, shape: Shape) -> None:
        self.shape = shape
        self.config = vllm_config(model, shape)
        cache = kv_cache_config(shape)
        self.config.cache_config.num_gpu_blocks = shape.blocks
        hashing = get_hash_fn_by_name(shape.hashing)
        init_none_hash(hashing)
        self._hasher = get_request_block_hasher(BLOCK, hashing)
        scheduler_class = self.config.scheduler_config.get_scheduler_cls()
        self.scheduler: Scheduler = scheduler_class(
            vllm_config=self.config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK,
            log_stats=True,
        )
        self.connector: Any = self.scheduler.connector
        self.ranks: list[Rank] = []
        try:
            self.ranks += [Rank(self.config, cache, rank) for rank in range(shape.ranks)]
            self._introduce_ranks()
        except BaseException:
            self.shutdown()
            raise
        self._aggregator = KVOutputAggregator.from_connector(self.connector, shape.ranks)
        self._under_way: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._asked: dict[str, Asked] = {}
        self.events: list[Any] = []
        self.steps = 0
        self._listen()

    def _introduce_ranks(self) -> None:
        handshakes = {
            (0, rank.rank): rank.connector.get_handshake_metadata() for rank in self.ranks
        }
        self.connector.set_xfer_handshake_metadata_pp_aware(handshakes)

    def _listen(self) -> None:
        publisher = self.scheduler.kv_event_publisher
        publisher.publish = lambda batch, *_: self.events.extend(batch.events)

    # -- requests ------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Iterable[int],
        tokens: int = 1,
        *,
        salt: str | None = None,
        lora: str = "",
        name: str = "",
        sampling: dict[str, Any] | None = None,
        transfer: dict[str, Any] | None = None,
    ) -> Asked:
        """Add a request that wants `tokens` tokens; `transfer`: its kv_transfer_params."""
        prompt = list(prompt)
        sampling = (sampling or {}) | (
            {"extra_args": {"kv_transfer_params": transfer}} if transfer else {}
        )
        number = next(_numbers)
        request = Request(
            request_id=name or f"request-{number}",
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=tokens, ignore_eos=True, **sampling),
            pooling_params=None,
            cache_salt=salt,
            lora_request=LoRARequest(lora, 1, "/nowhere") if lora else None,
            block_hasher=self._hasher,
        )
        asked = Asked(request.request_id, request, Text(prompt, salt or "", lora))
        self._asked[asked.id] = asked
        self.scheduler.add_request(request)
        return asked

    def ask(self, prompt: Iterable[int], tokens: int = 1, **options: Any) -> Asked:
        """Add a request, run until nothing is left to do, and check the answer."""
        asked = self.submit(prompt, tokens, **options)
        self.run()
        assert asked.answer == asked.text.generated(tokens)
        return asked

    def abort(self, asked: Asked) -> None:
        """The client has gone away."""
        self.scheduler.finish_requests(asked.id, RequestStatus.FINISHED_ABORTED)
        asked.finished = True

    def forget_device(self) -> None:
        """Lose the device's prefix cache; what was in the blocks is rubbish afterwards."""
        assert self.scheduler.reset_prefix_cache(), "some blocks are still in use"
        for rank in self.ranks:
            rank.scribble(range(self.shape.blocks))

    # -- steps ---------------------------------------------------------------------------------

    def step(self) -> SchedulerOutput:
        """One turn of the engine's loop."""
        self.steps += 1
        output = self.scheduler.schedule()
        self._note_loads()
        self._under_way.append((output, self._execute(output)))
        depth = self.config.max_concurrent_batches
        while len(self._under_way) >= depth or self._under_way_for_nothing():
            self._update(*self._under_way.popleft())
        if not output.total_num_scheduled_tokens:
            time.sleep(0.0005)  # an idle engine: let the threads that it waits for run
        return output

    def _under_way_for_nothing(self) -> bool:
        """Nothing more can be scheduled before a result is in."""
        return bool(self._under_way) and not self._under_way[-1][0].total_num_scheduled_tokens

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
        """Step until `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            self.step()

    def wait(self, condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
        """Without a step, wait until `condition` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.0005)

    def run(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Step until the engine would go to sleep."""
        self.until(lambda: not (self.scheduler.has_requests() or self._under_way), seconds)

    def settle(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Without a step, wait until the ranks have ended every save that they were given."""
        self.wait(
            lambda: all(
                len(self.core.orders.moves) <= rank.unreported_moves for rank in self.ranks
            ),
            seconds,
        )

    def _note_loads(self) -> None:
        for asked in self._asked.values():
            status = asked.request.status
            if status is RequestStatus.WAITING_FOR_REMOTE_KVS:
                asked.loaded = sum(self.connector._scheduler.hit_tokens(asked.request))

    def _execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        starts = {new.req_id: (new.num_computed_tokens, 0) for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        known = zip(cached.num_computed_tokens, cached.num_output_tokens, strict=True)
        starts |= dict(zip(cached.req_ids, known, strict=True))

        def forward(rank: Rank) -> None:
            # All write before anyone reads: what one request computes in this step, another
            # may attend to in the same step.
            ends = {
                name: at + output.num_scheduled_tokens[name] for name, (at, _) in starts.items()
            }
            for request, (start, _) in starts.items():
                self._compute(rank, request, start, ends[request])
            for request, end in ends.items():
                self._check(rank, request, starts[request][0], end)

        sampled = []
        for request, (start, generated) in starts.items():
            asked = self._asked[request]
            end = start + output.num_scheduled_tokens[request]
            asked.computed += end - start
            complete = end >= asked.text.prompt_length + generated
            sampled.append([asked.text.token(end)] if complete else [])
        results = [
            ModelRunnerOutput(
                req_ids=list(starts),
                req_id_to_index={request: index for index, request in enumerate(starts)},
                sampled_token_ids=sampled,
                kv_connector_output=rank.step(output, forward),
            )
            for rank in self.ranks
        ]
        if len(results) == 1:
            return results[0]
        together = self._aggregator.aggregate(results)
        assert together is not None
        return together

    def _compute(self, rank: Rank, request: str, start: int, end: int) -> None:
        for group, blocks in enumerate(self.scheduler.kv_cache_manager.get_block_ids(request)):
            rank.write(blocks, self._asked[request].text.digests(end), start, group)

    def _check(self, rank: Rank, request: str, start: int, end: int) -> None:
        digests = self._asked[request].text.digests(end)
        specs = self.shape.specs or (full_attention(),)
        tables = self.scheduler.kv_cache_manager.get_block_ids(request)
        for group, (spec, blocks) in enumerate(zip(specs, tables, strict=True)):
            window = getattr(spec, "sliding_window", None)
            seen = 0 if window is None else max(0, start - window + 1)
            wrong = rank.wrong(blocks, digests, group, seen)
            assert not wrong, f"{request} would attend to wrong bytes at {wrong} of {end}"

    def _update(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        for outputs in self.scheduler.update_from_output(output, result).values():
            for each in outputs.outputs:
                asked = self._asked[each.request_id]
                asked.answer += each.new_token_ids
                asked.finished |= each.finish_reason is not None
                asked.handed_over = asked.handed_over or each.kv_transfer_params

    # -- looking inside --------------------------------------------------------------------------

    @property
    def core(self) -> Leader:
        """The leader's core."""
        core = self.connector._scheduler_side._leader._core
        assert isinstance(core, Leader)
        return core

    def check_integrity(self) -> None:
        """All tables of the core agree. Others use it meanwhile, so it is asked as they do."""
        leader = self.connector._scheduler_side._leader
        leader.on_core(lambda core: core.check_integrity(), None)

    def announced(self) -> set[Any]:
        """What a subscriber to vLLM's events believes to be in the host tier."""
        held: set[Any] = set()
        for event in self.events:
            if isinstance(event, BlockStored) and event.medium == MEDIA[Tier.HOST]:
                held |= set(event.block_hashes)
            elif isinstance(event, BlockRemoved) and event.medium == MEDIA[Tier.HOST]:
                held -= set(event.block_hashes)
        return held

    def held_names(self) -> set[Any]:
        """What is in the host tier, by the names that vLLM's events use."""
        names = {
            name_of(block_hash): maybe_convert_block_hash(block_hash)
            for asked in self._asked.values()
            for block_hash in asked.request.block_hashes
        }
        return {names[block] for block in self.core.tiers.host.blocks()}

    @property
    def free_blocks(self) -> int:
        """In the device pool."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def check_nothing_is_left(self) -> None:
        """Every block, slot, pin, lease and table entry has been given back."""
        assert not self.scheduler.requests
        assert self.free_blocks == self.shape.blocks - 1, "device blocks leaked"
        self.check_integrity()
        core = self.core
        assert core.tiers.host.used == len(core.tiers.host), "a slot is still being filled"
        assert core.tiers.host.pinned == 0, "slots are still pinned"
        assert not core.busy
        assert not core.lookups.readers
        assert not self.connector._scheduler_side._followed

    def shutdown(self) -> None:
        """End, whatever state it is in."""
        for rank in self.ranks:
            rank.close()
        self.scheduler.shutdown()

    def close(self) -> None:
        """End, and fail if anything was left behind."""
        try:
            self.check_nothing_is_left()
        finally:
            self.shutdown()


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens; with another seed, other ones from the beginning."""
    return [(seed * 7919 + i * 31 + 1) % 500 for i in range(length)]
