"""What crosses a process: block names, messages, subjects, and the codec. Imports msgspec only."""
