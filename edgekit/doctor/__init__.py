"""The doctor: what works on this machine and on a device, and what to install."""
