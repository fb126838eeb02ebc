from multidomain_cct.files.seeds import seed_from


def test_seeds_are_the_same_in_every_process_and_version() -> None:
    assert seed_from(0, "camvid", 3) == 5000253735151232494
    assert seed_from("1") != seed_from(1)
