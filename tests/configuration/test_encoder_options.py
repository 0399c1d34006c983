from vitweave.configuration.encoder_options import rounded


def test_whole_numbers_alone_round_as_python_does():
    pairs = [(numerator, denominator) for denominator in (1, 2, 3, 7, 14, 16, 32) for numerator in range(200)]
    assert [rounded(*pair) for pair in pairs] == [round(numerator / denominator) for numerator, denominator in pairs]
