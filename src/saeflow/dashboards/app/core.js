// Data from scripts beside the page, elements, numbers, and the state that the address has. A page that is opened from
// disk may load scripts, but read no files: so each piece of data is a script that calls `saeflow.register`.
"use strict";

const saeflow = (() => {
  const pieces = new Map(); // what scripts have registered, by their address
  const loads = new Map();
  const MOST = 24; // pieces that are kept in memory

  function register(data) {
    pieces.set(document.currentScript.src, data);
  }

  // The data of a script, unpacked. Rejects where there is no such file.
  function load(path) {
    const address = new URL(path, document.baseURI).href;
    const known = loads.get(address);
    if (known) {
      loads.delete(address); // it is the last used now
      loads.set(address, known);
      return known;
    }
    const loading = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = address;
      script.onload = () => {
        script.remove();
        resolve(unpacked(pieces.get(address)));
        pieces.delete(address);
      };
      script.onerror = () => {
        script.remove();
        loads.delete(address);
        reject(new Error(`${path} is missing: copy the whole folder of this page, or run the workflow again`));
      };
      document.head.append(script);
    });
    loads.set(address, loading);
    if (loads.size > MOST) loads.delete(loads.keys().next().value);
    return loading;
  }

  const TYPES = { Uint8Array, Uint16Array, Uint32Array, Int32Array, Float32Array };

  // Packed arrays (saeflow.dashboards.scripts) anywhere within, as typed arrays.
  function unpacked(value) {
    if (Array.isArray(value) || value === null || typeof value !== "object") return value;
    if (TYPES[value.type] && typeof value.data === "string") return typed(value);
    for (const name of Object.keys(value)) value[name] = unpacked(value[name]);
    return value;
  }

  function typed(packed) {
    const text = atob(packed.data),
      bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const array = new TYPES[packed.type](bytes.buffer);
    array.width = packed.shape.length > 1 ? packed.shape[1] : 1;
    return array;
  }

  // Row i of a list column, or of a matrix.
  const listed = (column, i) => column.values.subarray(column.offsets[i], column.offsets[i + 1]);
  const row = (matrix, i) => matrix.subarray(i * matrix.width, (i + 1) * matrix.width);

  // An element with attributes (`on...` are listeners) and children; texts among these stay texts, whatever they hold.
  function el(name, attributes = {}, ...children) {
    return fill(document.createElement(name), attributes, children);
  }

  function svg(name, attributes = {}, ...children) {
    return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
  }

  function fill(element, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else element.setAttribute(key, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
    return element;
  }

  const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 7 }); // to make one takes longer than to use it

  // A number for people: three digits that count, "–" for none.
  function number(value, digits = 3) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (Number.isInteger(value)) return plain.format(value).replace("-", "−");
    if (size >= 1e6 || size < 1e-4)
      return value
        .toExponential(digits - 1)
        .replace("e", " e")
        .replaceAll("-", "−");
    return plain.format(Number(value.toPrecision(digits))).replace("-", "−");
  }

  function share(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const percent = 100 * value;
    if (percent > 0 && percent < 0.001) return "< 0.001 %";
    return `${plain.format(Number(percent.toPrecision(3)))} %`.replace("-", "−");
  }

  // What the part of the address behind # says, and the reverse; empty values are left out.
  function parseAddress(hash) {
    const found = {};
    for (const [key, value] of new URLSearchParams(hash.replace(/^#/, ""))) found[key] = value;
    return found;
  }

  function address(state) {
    const kept = Object.entries(state).filter(([, value]) => value !== "" && value !== null && value !== undefined);
    return `#${new URLSearchParams(kept)}`;
  }

  return { register, load, listed, row, el, svg, number, share, parseAddress, address };
})();
