"""Faults on purpose: processes that are killed, stopped, late or wrong, and wires that lose, swap and change messages."""
