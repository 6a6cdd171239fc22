"""The words that queen, worker and rbee-ctl share: errors, settings, messages, events. No I/O but reading settings files."""
