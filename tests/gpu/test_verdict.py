"""Tests of the comparison: python3 -m unittest discover tests/gpu"""

import unittest

from verdict import DIFFERS, FAILED, IDENTICAL, NOISE, NOT_BARE, SAME_TESTS, SKIPPED, Run, first_error, judge


def run(digest="a", numbers=(1.0, 2.0), **outcomes):
    result = {"exact": {"out": digest}, "numbers": {"out": list(numbers)}}
    if outcomes:
        result["outcomes"] = outcomes
    return Run(result=result)


class Outputs(unittest.TestCase):
    def test_equal_hashes_are_identical(self):
        self.assertEqual(judge(run(), run(), run())[0], IDENTICAL)

    def test_a_program_that_repeats_itself_bare_may_not_change_under_the_shim(self):
        self.assertEqual(judge(run(), run(), run("b", (1.0, 2.0000001)))[0], DIFFERS)

    def test_noise_is_measured_between_two_bare_runs(self):
        bare, again = run("a", (1.0, 2.0)), run("b", (1.0, 2.002))
        self.assertEqual(judge(bare, again, run("c", (1.0, 2.003)))[0], NOISE)
        self.assertEqual(judge(bare, again, run("c", (1.0, 2.1)))[0], DIFFERS)

    def test_a_hash_that_only_one_bare_run_shares_is_noise_and_not_identity(self):
        self.assertEqual(judge(run("a"), run("b", (1.0, 2.1)), run("a"))[0], NOISE)

    def test_not_a_number_is_equal_only_to_itself(self):
        nan = float("nan")
        self.assertEqual(judge(run("a", (nan,)), run("b", (nan,)), run("c", (nan,)))[0], NOISE)
        self.assertEqual(judge(run("a", (1.0,)), run("b", (1.1,)), run("c", (nan,)))[0], DIFFERS)

    def test_missing_outputs_are_no_agreement(self):
        self.assertEqual(judge(run(), run(), Run(result={"exact": {}}))[0], DIFFERS)
        self.assertEqual(judge(Run(), Run(), Run())[0], FAILED)


class Ends(unittest.TestCase):
    def test_a_failure_counts_only_if_bare_runs_succeed(self):
        broken = Run(error="boom")
        self.assertEqual(judge(run(), run(), broken), (FAILED, "boom"))
        self.assertEqual(judge(broken, run(), broken)[0], NOT_BARE)
        self.assertEqual(judge(run(), broken, run())[0], NOT_BARE)
        self.assertEqual(judge(Run(skipped="no nvcc"), run(), run())[0], SKIPPED)

    def test_tests_that_pass_bare_must_pass(self):
        bare = run(x="ok", y="ok", z="failed: old")
        self.assertEqual(judge(bare, bare, run(x="ok", y="ok", z="ok"))[0], SAME_TESTS)
        verdict, note = judge(bare, bare, run(x="ok", y="error: new", z="ok"))
        self.assertEqual(verdict, FAILED)
        self.assertIn("y: error: new", note)
        # One that does not pass every time bare is nobody's fault.
        self.assertEqual(judge(bare, run(x="ok", y="failed"), run(x="ok", y="failed"))[0], SAME_TESTS)
        self.assertEqual(judge(bare, bare, run(q="ok"))[0], FAILED)


    def test_outputs_of_a_suite_are_compared_as_far_as_all_runs_came(self):
        bare = run(x="ok", y="ok")
        bare.result["exact"]["late"] = "l"
        bare.result["numbers"]["late"] = []
        self.assertEqual(judge(bare, bare, run(x="ok"))[0], SAME_TESTS)
        verdict, note = judge(bare, bare, run("b", x="ok"))
        self.assertEqual(verdict, DIFFERS)
        self.assertIn("out", note)


class Errors(unittest.TestCase):
    def test_the_last_line_of_a_traceback_is_the_error(self):
        text = 'x\nTraceback (most recent call last):\n  File "a", line 1\n    f()\ntorch.OutOfMemoryError: no\nbye error\n'
        self.assertEqual(first_error(text), "torch.OutOfMemoryError: no")

    def test_without_a_traceback_the_first_error_is_it(self):
        self.assertEqual(first_error("starting\nCUDA error 1 at 7\nother error\n"), "CUDA error 1 at 7")
        self.assertEqual(first_error("one\ntwo\n"), "two")
        self.assertEqual(first_error(""), "no output")


if __name__ == "__main__":
    unittest.main()
