"""One call of attention: ``functional`` has the public functions, ``call`` what they share, ``checks`` the checks of arguments.
``dispatch`` chooses a kernel and ``explain`` shows the choice; ``records`` and ``profile`` say what ran; ``export`` is the way of a graph
that is exported.
"""
