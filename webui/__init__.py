"""The page in the browser: it gives the program's commands, and reads what they write. All its state is in files.

    main      the command line: the page, and two small programs that it starts, `run` and `look`
    program   how dreambooth_implementation.py is called, its fields, the values of its recipes
    seen      photos, captions and remarks as the program sees them: what `look` prints
    jobs      a command of the program as a folder: waiting, running, stopped, failed or done
    runner    `run`: the process beside a command, which notes how it ended and lasts when the page ends
    line      which job is next
    logs      progress, losses and errors out of what a command printed
    places    the folders of the library, and what may be given out of them
    library   what was trained, as cards
    draft     the photos and fields of the next training
    pictures  what was drawn, with what made it
    actions   what the page's buttons do
    state     all that the page shows
    guard     who is answered
    server    the HTTP server
    static/   the page itself, and its words in English and Chinese
"""
