"""Where a launch stands, for the person who waits for it: a bar in a terminal, plain lines elsewhere.

The driver tells what happens (``status``), and a view shows it: ``plain`` or ``terminal``. ``choice`` picks one.
"""
