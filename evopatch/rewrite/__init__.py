"""Changing modules and graphs: another class for a module, another forward for its code. No tokens here."""
