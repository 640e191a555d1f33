// Browsers start no worker from a file, and the search is one. Where the site is opened from disk, it runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.answer = data => this.dispatchEvent(new MessageEvent("message", { data }))
      frame.srcdoc = `<body><script>
        window.postMessage = data => frameElement.answer(data)
        window.importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise(loaded => {
          const script = document.createElement("script")
          script.src = url
          script.onload = loaded
          document.body.append(script)
        })), Promise.resolve())
      </script><script src="${url}"></script></body>`
      this.ready = new Promise(loaded => frame.onload = loaded)
      this.frame = document.body.appendChild(frame)
    }
    postMessage(data) {
      const inside = this.frame.contentWindow
      this.ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
