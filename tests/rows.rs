//! Rows of data files: the same from JSON lines and parquet, named by line or row where they are wrong, and no panic
//! whatever the bytes; BoolQ in the hub's layout.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use candor_environments::rows::{each_row, split_files};
use candor_environments::{Context, Environment, REGISTRY, Split};
use flate2::Compression;
use flate2::write::GzEncoder;
use parquet::basic::{Compression as Codec, GzipLevel, ZstdLevel};
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use serde_json::{Map, Value, json};

use crate::check;

/// What `each_row` gives: rows with their indexes, or the error.
fn rows(path: &Path) -> Result<Vec<(usize, Value)>, String> {
    let mut rows = Vec::new();
    let read = each_row(path, |index, row: Map<String, Value>| {
        rows.push((index, Value::Object(row)));
        Ok(())
    });
    read.map(|()| rows).map_err(|error| format!("{error:#}"))
}

/// Writes columns by a function per row group.
fn parquet(path: &Path, schema: &str, codec: Codec, groups: &[fn(&mut SerializedRowGroupWriter<File>)]) {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(codec).build());
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    for group in groups {
        let mut columns = writer.next_row_group().unwrap();
        group(&mut columns);
        columns.close().unwrap();
    }
    writer.close().unwrap();
}

macro_rules! column {
    ($group:expr, $kind:ty, $values:expr, $present:expr) => {
        let mut column = $group.next_column().unwrap().unwrap();
        column.typed::<$kind>().write_batch($values, $present, None).unwrap();
        column.close().unwrap();
    };
}

const BOOLQ: &str =
    "message m { required binary question (UTF8); required boolean answer; required binary passage (UTF8); }";

/// One row group of BoolQ's columns: an answered question and its opposite.
fn boolq(group: &mut SerializedRowGroupWriter<File>) {
    column!(group, ByteArrayType, &[ByteArray::from("is snow black"), ByteArray::from("is snow white")], None);
    column!(group, BoolType, &[false, true], None);
    column!(group, ByteArrayType, &[ByteArray::from("Snow is white."), ByteArray::from("Snow is white.")], None);
}

#[test]
fn parquet_and_json_lines_give_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let schema = "message m { optional binary text (UTF8); required binary raw; required int64 n; required double x; }";
    let wanted = [
        json!({"text": "é", "raw": "plain", "n": -3, "x": 0.1}),
        json!({"text": null, "raw": "/w==", "n": i64::MAX, "x": 2.5}),
    ];
    for (name, codec) in [
        ("none", Codec::UNCOMPRESSED),
        ("snappy", Codec::SNAPPY),
        ("gzip", Codec::GZIP(GzipLevel::default())),
        ("zstd", Codec::ZSTD(ZstdLevel::default())),
    ] {
        let path = folder.path().join(format!("{name}.parquet"));
        parquet(
            &path,
            schema,
            codec,
            &[|group| {
                column!(group, ByteArrayType, &[ByteArray::from("é")], Some(&[1, 0]));
                column!(group, ByteArrayType, &[ByteArray::from("plain"), ByteArray::from(vec![0xff])], None);
                column!(group, Int64Type, &[-3, i64::MAX], None);
                column!(group, DoubleType, &[0.1, 2.5], None);
            }],
        );
        assert_eq!(rows(&path).unwrap(), [(0, wanted[0].clone()), (1, wanted[1].clone())], "{name}");
    }
    let text = format!("{}\n\n{}\n", wanted[0], wanted[1]);
    let plain = folder.path().join("rows.jsonl");
    fs::write(&plain, &text).unwrap();
    let zipped = folder.path().join("rows.jsonl.gz");
    let mut encoder = GzEncoder::new(File::create(&zipped).unwrap(), Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap();
    for path in [plain, zipped] {
        assert_eq!(rows(&path).unwrap(), [(0, wanted[0].clone()), (1, wanted[1].clone())]);
    }
}

#[test]
fn rows_count_on_through_row_groups_and_errors_name_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    parquet(&path, BOOLQ, Codec::SNAPPY, &[boolq, boolq]);
    assert_eq!(rows(&path).unwrap().iter().map(|(index, _)| *index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let stop = each_row(&path, |index, _: Value| match index {
        2 => anyhow::bail!("field `x`: wrong"),
        _ => Ok(()),
    });
    assert_eq!(format!("{:#}", stop.unwrap_err()), format!("{}, row 2: field `x`: wrong", path.display()));
    let path = folder.path().join("long.jsonl");
    fs::write(&path, vec![b' '; 64 << 20]).unwrap();
    assert!(rows(&path).unwrap_err().contains("long.jsonl, line 1: a line of"));
    fs::write(&path, "{}\n{\"a\": 1, \"b\n").unwrap();
    let wanted = "line 2: not the JSON expected, at column 11: EOF while parsing a string";
    assert_eq!(rows(&path).unwrap_err(), format!("{}, {wanted}", path.display()), "the column is the only other place");
}

/// No prefix of a file and no file with a changed byte makes the reader panic or run away.
#[test]
fn damaged_parquet_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    parquet(&path, BOOLQ, Codec::SNAPPY, &[boolq]);
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let error = rows(&path).expect_err("a truncated file");
        assert!(error.contains("a.parquet: not a whole parquet file"), "{error}");
    }
    let mut failed = 0;
    for place in 0..whole.len() {
        for value in [0x00, 0xff, whole[place] ^ 0x80] {
            let mut changed = whole.clone();
            changed[place] = value;
            fs::write(&path, &changed).unwrap();
            if let Err(error) = rows(&path) {
                failed += 1;
                assert!(error.contains("a.parquet"), "{error}");
            }
        }
    }
    assert!(failed > whole.len() / 2, "{failed} of {}", 3 * whole.len());
    for bytes in [&b""[..], b"PAR1", b"PAR1PAR1", b"PAR1\xff\xff\xff\x7fPAR1", b"{\"question\": \"q\"}"] {
        fs::write(&path, bytes).unwrap();
        assert!(rows(&path).unwrap_err().contains("not a whole parquet file"));
    }
}

#[test]
fn a_split_is_all_of_its_shards_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let touch = |name: &str| fs::write(folder.path().join(name), "").unwrap();
    let names = || {
        let files = split_files(folder.path(), "train").map_err(|error| error.to_string())?;
        Ok::<_, String>(
            files.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_string()).collect::<Vec<_>>(),
        )
    };
    assert_eq!(names().unwrap(), Vec::<String>::new());
    let shards =
        ["train-00000-of-00003.parquet", "train-00001-of-00003-0a1b2c.parquet", "train-00002-of-00003.parquet"];
    for name in [shards[2], shards[0], "train-all.parquet", "training-00000-of-00001.parquet", "train-0-of-1.json"] {
        touch(name);
    }
    assert!(names().unwrap_err().contains("2 shards train-…-of-….parquet, not each of 3 once"));
    touch(shards[1]);
    assert_eq!(names().unwrap(), shards);
    touch("train-00001-of-00003.parquet");
    assert!(names().unwrap_err().contains("4 shards"));
    touch("train.parquet");
    assert_eq!(names().unwrap(), ["train.parquet"]);
}

fn load(source: &Path, split: Split) -> anyhow::Result<Box<dyn Environment>> {
    let options = "source = \"the source\"".parse().unwrap();
    let resolve = |_: &str| Ok(source.to_owned());
    let (_, load) = REGISTRY.iter().find(|(name, _)| *name == "boolq").unwrap();
    load(&Context::new(split, &options, &resolve, None))
}

#[test]
fn boolq_is_read_as_the_hub_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    parquet(&data.join("train-00001-of-00002.parquet"), BOOLQ, Codec::SNAPPY, &[boolq, boolq]);
    parquet(&data.join("train-00000-of-00002.parquet"), BOOLQ, Codec::ZSTD(ZstdLevel::default()), &[boolq]);
    parquet(&data.join("validation-00000-of-00001.parquet"), BOOLQ, Codec::SNAPPY, &[boolq]);
    for path in [folder.path(), &data] {
        let [train, heldout] = [Split::Train, Split::Heldout].map(|split| load(path, split).unwrap());
        assert_eq!((train.num_tasks(), heldout.num_tasks()), (6, 2));
        assert_eq!((heldout.task(1).id.as_str(), train.task(0).prompt.len()), ("boolq/validation/1", 1));
        assert!(train.task(5).prompt[0].content.contains("Passage: Snow is white."));
    }
    let no_answer = "message m { required binary question (UTF8); required binary passage (UTF8); }";
    parquet(
        &data.join("train.parquet"),
        no_answer,
        Codec::SNAPPY,
        &[|group| {
            column!(group, ByteArrayType, &[ByteArray::from("q")], None);
            column!(group, ByteArrayType, &[ByteArray::from("p")], None);
        }],
    );
    let error = format!("{:#}", load(folder.path(), Split::Train).err().unwrap());
    assert!(error.contains("train.parquet, row 0: field `answer` is missing"), "{error}");
    parquet(&data.join("train.parquet"), BOOLQ, Codec::SNAPPY, &[]);
    let error = format!("{:#}", load(folder.path(), Split::Train).err().unwrap());
    assert!(error.contains("train.parquet: empty: there are no rows"), "{error}");
}

/// BoolQ as parquet gives the tasks that Google's JSON lines give.
#[test]
fn real_boolq_is_the_same_from_parquet() {
    let Some(source) = check::data("boolq") else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("validation.parquet");
    let (mut questions, mut answers, mut passages) = (Vec::new(), Vec::new(), Vec::new());
    for (_, row) in rows(&source.join("dev.jsonl")).unwrap() {
        questions.push(ByteArray::from(row["question"].as_str().unwrap()));
        answers.push(row["answer"].as_bool().unwrap());
        passages.push(ByteArray::from(row["passage"].as_str().unwrap()));
    }
    let (schema, properties) = (Arc::new(parse_message_type(BOOLQ).unwrap()), Arc::default());
    let mut writer = SerializedFileWriter::new(File::create(&path).unwrap(), schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    column!(group, ByteArrayType, &questions, None);
    column!(group, BoolType, &answers, None);
    column!(group, ByteArrayType, &passages, None);
    group.close().unwrap();
    writer.close().unwrap();
    let [lines, parquet] = [&*source, folder.path()].map(|source| load(source, Split::Heldout).unwrap());
    assert_eq!((lines.num_tasks(), parquet.num_tasks()), (3270, 3270));
    assert!((0..3270).all(|index| lines.task(index) == parquet.task(index)));
}
