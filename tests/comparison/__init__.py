"""Whether two trees convert the same: tiny models, converted by the scripts of each, compared to the last bit.

    python -m tests.comparison since COMMIT                            # that commit and this tree
    python -m tests.comparison record --tree PATH --out FILE.json      # some minute; PATH is any tree of Octavo
    python -m tests.comparison compare FILE.json OTHER.json            # a line per difference; exit code 1 if any
    python -m tests.comparison layout                                  # write layout.json anew

A tree is asked by what users touch: the flags of its scripts, its outputs as transformers loads them where Octavo
cannot be imported, and the two lines on a stock model. So its modules may have any names. The bytes of a record depend
on the machine and on the versions of torch and transformers; compare records of one machine.
"""
