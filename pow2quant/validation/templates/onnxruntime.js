// Runs an ONNX model in onnxruntime-web (WebAssembly) or onnxruntime-node, on one thread.
// Arguments: the package, and a folder with model.onnx, inputs.json [{name, shape}] and input0.bin … (float32).
// Writes outputs.json [{name, type, shape}] and output0.bin …; without a folder it prints the version.

const fs = require('fs');
const path = require('path');
const { createRequire } = require('module');

const [name, folder] = process.argv.slice(2);

function load() {
  try {
    return createRequire(path.join(process.cwd(), 'here.js'))(name);
  } catch {
    return require(name); // along NODE_PATH
  }
}

async function main() {
  const ort = load();
  if (!folder) {
    console.log(ort.env.versions.web || ort.env.versions.node);
    return;
  }
  const read = (name) => fs.readFileSync(path.join(folder, name));
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = 'error';
  const session = await ort.InferenceSession.create(read('model.onnx'), {
    executionProviders: [name === 'onnxruntime-web' ? 'wasm' : 'cpu'],
    intraOpNumThreads: 1,
  });
  const feed = {};
  JSON.parse(read('inputs.json')).forEach(({ name, shape }, i) => {
    const bytes = read(`input${i}.bin`);
    feed[name] = new ort.Tensor('float32', new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)), shape);
  });
  const results = await session.run(feed);
  const written = session.outputNames.map((name, i) => {
    const { data, dims, type } = results[name];
    fs.writeFileSync(path.join(folder, `output${i}.bin`), Buffer.from(data.buffer, data.byteOffset, data.byteLength));
    return { name, type, shape: dims };
  });
  fs.writeFileSync(path.join(folder, 'outputs.json'), JSON.stringify(written));
}

main().catch((error) => {
  console.error(String(error && error.message ? error.message : error));
  process.exit(1);
});
