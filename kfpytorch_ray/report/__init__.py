"""What happened in a run, and the page that shows it: plain data (``data``), and how it is drawn (``page``).

Knows no other room, so that results and errors can carry a report wherever they go. Who records one is the backend's
business. Drawing needs Jinja2, which is imported when a page is asked for and no sooner.
"""
