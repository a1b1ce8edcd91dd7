use super::*;

fn corpus(n: usize) -> Corpus {
    Corpus::new((0..n).map(|i| format!("The {i}th fox has {} tails, and it is happy.", i * 7)))
}

fn config() -> TrainConfig {
    let mut config = TrainConfig::default();
    config.set("tokenizer.vocab_size=300").unwrap();
    config.set("run.sequence_length=16").unwrap();
    config.set("data.validation=0.1").unwrap();
    config
}

#[test]
fn an_epoch_has_every_token_once() {
    let data = Dataset::new(&corpus(40), &config(), None).unwrap();
    assert_eq!(data.vocab_size, 300);
    let per_epoch = data.pools[0].sequences;
    let mut epoch = Epoch::default();
    let mut firsts = Vec::new();
    for step in 0..2 * per_epoch as u64 {
        let Batch { inputs, targets, .. } = data.batch(step, 1, &mut epoch);
        assert_eq!((inputs.len(), &inputs[1..]), (16, &targets[..15]));
        firsts.push(inputs);
    }
    let count = |from: usize| {
        let mut counts = vec![0; data.vocab_size];
        firsts[from..from + per_epoch].iter().flatten().for_each(|&t| counts[t as usize] += 1);
        counts.iter().sum::<usize>()
    };
    assert_eq!((count(0), count(per_epoch)), (per_epoch * 16, per_epoch * 16));
    assert_ne!(firsts[..per_epoch], firsts[per_epoch..]);
    // A step is the same wherever a run begins, and with other steps' batches beside it.
    let alone = data.batch(per_epoch as u64 / 2, 2, &mut Epoch::default());
    assert_eq!(alone, data.batch(per_epoch as u64 / 2, 2, &mut epoch));
}

#[test]
fn validation_documents_are_kept_apart_and_whole() {
    let corpus = corpus(40);
    let config = config();
    let (training, validation) = corpus.split(0.1, 1, false);
    assert_eq!((training.len(), training[0].len(), validation.len()), (1, 36, 4));
    assert!(validation.iter().all(|text| !training[0].contains(text)));
    assert_ne!(corpus.split(0.1, 2, false).1, validation);
    let data = Dataset::new(&corpus, &config, None).unwrap();
    let tokenizer = Tokenizer::from_bytes(&data.tokenizer_json).unwrap();
    let (_, texts) = corpus.split(0.1, config.seed, false);
    let mut windows = data.validation().iter();
    for text in texts {
        let mut joined = Vec::new();
        loop {
            let window = windows.next().unwrap();
            assert_eq!(window.inputs.len(), 16);
            joined.extend(&window.targets);
            if joined.last() == Some(&data.begin) {
                break;
            }
            assert_eq!(window.targets.len(), 16);
        }
        joined.pop();
        assert_eq!(tokenizer.decode(&joined, false).unwrap(), text);
    }
    assert!(windows.next().is_none());
}

#[test]
fn too_little_text_is_refused() {
    let error = Dataset::new(&Corpus::new(["a".to_owned()]), &config(), None).unwrap_err().to_string();
    assert!(error.contains("sequence"), "{error}");
}

/// Two sources of words that occur in no other, so that a sequence shows its source.
fn mixed(weights: &str) -> (Dataset, impl Fn(&[u32]) -> (usize, usize)) {
    let dir = tempfile::tempdir().unwrap();
    let sources = ["fox ", "owl "].map(|word| {
        let path = dir.path().join(word.trim());
        std::fs::write(&path, (0..60).map(|i| word.repeat(3 + i % 5) + "\n").collect::<String>()).unwrap();
        path
    });
    let mut config = config();
    config.set("data.documents=line").unwrap();
    config.set(&format!("data.weights={weights}")).unwrap();
    let corpus = Corpus::read(&sources, &config.data).unwrap();
    let data = Dataset::new(&corpus, &config, None).unwrap();
    let tokenizer = Tokenizer::from_bytes(&data.tokenizer_json).unwrap();
    let count = move |tokens: &[u32]| {
        let text = tokenizer.decode(tokens, true).unwrap();
        (text.matches("fo").count(), text.matches("ow").count())
    };
    (data, count)
}

#[test]
fn sources_are_mixed_by_their_weights() {
    let (data, count) = mixed("[3, 1]");
    let mut epoch = Epoch::default();
    let mut sources = [0, 0];
    let mut steps = Vec::new();
    for step in 0..10 {
        let Batch { inputs, .. } = data.batch(step, 4, &mut epoch);
        for sequence in inputs.chunks(16) {
            let (foxes, owls) = count(sequence);
            assert!((foxes == 0) != (owls == 0), "a sequence has one source: {foxes} {owls}");
            sources[usize::from(owls > 0)] += 1;
        }
        steps.push(inputs);
    }
    assert_eq!(sources, [30, 10]);
    // Any step alone, and one before it.
    for step in [7, 2] {
        assert_eq!(data.batch(step, 4, &mut Epoch::default()).inputs, steps[step as usize]);
        assert_eq!(data.batch(step, 4, &mut epoch).inputs, steps[step as usize]);
    }
}

#[test]
fn weights_are_of_the_sources() {
    let mut config = config();
    config.set("data.weights=[1, 2]").unwrap();
    let error = Dataset::new(&corpus(40), &config, None).unwrap_err().to_string();
    assert!(error.contains("2 weights for 1 sources"), "{error}");
}
