"""--infer."""



def test_infer_takes_one_model(run, recorded):
    recorded("output"), recorded("other")
    status, _, err = run("--infer", "--model_path", "output", "--model_path", "other", "--prompt", "a dog")
    assert status == 2 and "--adapter" in err
