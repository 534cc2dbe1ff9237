"""Devices and processes: selection, agreement between processes, a watchdog."""
