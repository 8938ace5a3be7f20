"""What the interface needs of MPI."""

from tests.trtllm.mpi import mpi_allgather, mpi_broadcast, mpi_rank, mpi_world_size

__all__ = ["mpi_allgather", "mpi_broadcast", "mpi_rank", "mpi_world_size"]
