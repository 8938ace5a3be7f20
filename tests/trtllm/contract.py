"""What TensorRT-LLM's executor believes of a connector, as assertions around every call.

The manager stands between the executor and the connector on each rank. It makes the calls of the
published one in its order, and fails where the connector's answer breaks what is documented.
"""

from __future__ import annotations

import inspect
from typing import Any

from tests.trtllm.forms import Form
from tests.trtllm.mpi import mpi_allgather, mpi_broadcast, mpi_rank
from tests.trtllm.pool import BLOCK_TOKENS


def check_signatures(form: Form, leader: type, worker: type) -> None:
    """Every published method is there, and takes what it is given, by place and by name."""
    for base, ours in zip(form.bases, (leader, worker), strict=True):
        assert issubclass(ours, base)
        assert not inspect.isabstract(ours), f"missing: {ours.__abstractmethods__}"
        for name, method in inspect.getmembers(base, inspect.isfunction):
            published = list(inspect.signature(method).parameters)
            got = inspect.signature(getattr(ours, name)).parameters
            assert list(got) == published, f"{ours.__name__}.{name} takes {list(got)}"
            needed = [p.name for p in got.values() if p.default is p.empty]
            assert needed == [
                p.name
                for p in inspect.signature(method).parameters.values()
                if p.default is p.empty
            ]


class Stream:
    """Where a GPU's work would be queued; on a CPU it is done at once."""


class Manager:
    """One rank's connector, and what is between its calls."""

    def __init__(self, form: Form, worker: Any, leader: Any) -> None:
        assert (leader is not None) == (mpi_rank() == 0)
        self._form = form
        self.worker, self.leader = worker, leader
        self.stream = Stream()
        self._asked: set[int] = set()
        self._new_loading: set[int] = set()
        self._new_saving: dict[int, Any] = {}
        self._told_loading: set[int] = set()
        self._told_saving: dict[int, Any] = {}
        self._here_loaded: set[int] = set()
        self._here_saved: set[int] = set()
        self.output: Any = None
        self._phase = "idle"

    def _on_leader(self, ask: Any) -> Any:
        return mpi_broadcast(ask() if self.leader is not None else None)

    def register(self, memory: Any, **described: Any) -> None:
        if self._form.by_group:
            self.worker.register_kv_cache_layout(memory.layout(**described))
            if self.leader is not None:
                self.leader.wait_for_initialization()
        else:
            self.worker.register_kv_caches(memory.tensor)
        self.worker.register_forward_pass_callable()

    # -- in the order of a step -------------------------------------------------------------

    def matched(self, request: Any, computed: int) -> int:
        """Once for each allocation: how much comes from elsewhere."""
        assert request.request_id not in self._asked, "asked twice"
        self._asked.add(request.request_id)
        tokens, later = self._on_leader(
            lambda: self.leader.get_num_new_matched_tokens(request, computed)
        )
        assert isinstance(tokens, int)
        assert isinstance(later, bool)
        assert tokens or not later, "nothing is loaded, and yet later"
        assert tokens % BLOCK_TOKENS == 0
        assert computed + tokens < len(request.tokens), "the last token has to be computed"
        if later:
            self._new_loading.add(request.request_id)
        return tokens

    def allocated(self, request: Any, tables: list[list[int]]) -> None:
        if self.leader is None:
            return
        if self._form.by_group:
            self.leader.update_state_after_alloc_by_layer_group(request, tables)
        else:
            self.leader.update_state_after_alloc(request, *tables)

    def is_parked(self, request: Any) -> bool:
        return request.request_id in self._new_loading

    def start(self) -> None:
        """The step's metadata on all ranks, and its loads."""
        assert self._phase == "idle"
        if self.output is not None:
            metadata = self._on_leader(lambda: self.leader.build_connector_meta(self.output))
            self.output = None
            self.worker.bind_connector_meta(metadata)
        self.worker.start_load_kv(self.stream)
        self._phase = "started"

    def before_layer(self, layer: int) -> None:
        assert self._phase == "started"
        self.worker.wait_for_layer_load(layer, self.stream)

    def after_layer(self, layer: int) -> None:
        self.worker.save_kv_layer(layer, self.stream)

    def computed(self) -> None:
        self.worker.wait_for_save(self.stream)

    def reset(self, request: Any) -> None:
        """The request's blocks are gone; it will be asked about, and told of, as if new."""
        self._asked.discard(request.request_id)
        if self.leader is not None and hasattr(self.leader, "request_reset"):
            self.leader.request_reset(request)

    def finished(self, request: Any, tables: list[list[int]]) -> bool:
        """Whether the request's blocks have to stay."""
        self._asked.discard(request.request_id)

        def ask() -> bool:
            if self._form.by_group:
                answer = self.leader.request_finished_by_layer_group(request, tables)
            else:
                answer = self.leader.request_finished(request, *tables)
            assert isinstance(answer, bool)
            return answer

        stay = bool(self._on_leader(ask))
        if stay:
            self._new_saving[request.request_id] = request
        return stay

    def take_finished(self) -> tuple[list[Any], set[int]]:
        """Requests whose blocks may go on all ranks, and those that are loaded on all."""
        started, ended = sorted(self._new_loading), sorted(self._new_saving)
        self._told_loading |= self._new_loading
        self._told_saving |= self._new_saving
        self._new_loading, self._new_saving = set(), {}
        saved, loaded = self.worker.get_finished(ended, started)
        self._phase = "idle"
        assert len(set(saved)) == len(saved)
        assert len(set(loaded)) == len(loaded)
        assert set(saved) <= self._told_saving.keys() - self._here_saved, "saved what nobody asked"
        assert set(loaded) <= self._told_loading - self._here_loaded, "loaded what nobody asked"
        self._here_saved |= set(saved)
        self._here_loaded |= set(loaded)
        all_ranks = mpi_allgather((self._here_saved, self._here_loaded))
        everywhere_saved = set.intersection(*(set(each[0]) for each in all_ranks))
        everywhere_loaded = set.intersection(*(set(each[1]) for each in all_ranks))
        self._here_saved -= everywhere_saved
        self._here_loaded -= everywhere_loaded
        self._told_loading -= everywhere_loaded
        return [self._told_saving.pop(number) for number in everywhere_saved], everywhere_loaded
